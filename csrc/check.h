// A failed condition becomes Python's ValueError: "<op>: <argument> must be <wanted>, got <got>".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace normtweak {

template <class Got>
void check(bool condition, const char* op, const char* argument, const std::string& wanted, const Got& got) {
    if (condition) return;
    std::ostringstream message;
    message << op << ": " << argument << " must be " << wanted << ", got " << got;
    throw std::invalid_argument(message.str());  // pybind11 raises it as ValueError
}

}  // namespace normtweak
