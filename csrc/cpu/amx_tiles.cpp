#include "amx_tiles.h"

#include <cstring>
#include <stdexcept>

#include "kernels.h"

namespace normtweak {

#if defined(__x86_64__)

namespace {

struct TileState {
    TileConfig config;
    uint8_t data[kTiles][kTileRows][kTileBytes];
    bool configured = false;
};

thread_local TileState state;

void require(bool condition, const char* what) {
    if (!condition) throw std::logic_error(what);
}

void require_tile(int tile) {
    require(state.configured, "a tile is used without a configuration");
    require(state.config.rows[tile] != 0 && state.config.row_bytes[tile] != 0, "a tile of no size is used");
}

// Every instruction that writes a tile clears what lies past its size.
void clear_past_size(int tile) {
    const int rows = state.config.rows[tile], bytes = state.config.row_bytes[tile];
    for (int row = 0; row < kTileRows; ++row) {
        const int kept = row < rows ? bytes : 0;
        std::memset(state.data[tile][row] + kept, 0, static_cast<size_t>(kTileBytes - kept));
    }
}

template <class Tiles>
void product_of_tiles(const TileProduct& p) {
    TileConfig config;
    const int rows[] = {p.m, p.m, p.k}, row_bytes[] = {4 * p.n, 4 * p.k, 4 * p.n};
    for (int tile = 0; tile < 3; ++tile) {
        config.rows[tile] = static_cast<uint8_t>(rows[tile]);
        config.row_bytes[tile] = static_cast<uint16_t>(row_bytes[tile]);
    }
    Tiles::configure(config);
    if (p.add)
        Tiles::template load<0>(p.c, p.stride_c);
    else
        Tiles::template zero<0>();
    Tiles::template load<1>(p.a, p.stride_a);
    Tiles::template load<2>(p.b, p.stride_b);
    Tiles::template dot<0, 1, 2>();
    Tiles::template store<0>(p.c, p.stride_c);
    Tiles::release();
}

}  // namespace

void EmulatedTiles::configure(const TileConfig& config) {
    require(config.palette == 1 && config.start_row == 0, "the configuration must be of palette 1");
    for (int tile = 0; tile < 16; ++tile) {
        const int rows = config.rows[tile], bytes = config.row_bytes[tile];
        require(tile < kTiles ? rows <= kTileRows && bytes <= kTileBytes : rows == 0 && bytes == 0,
                "a tile's size must fit palette 1");
        require((rows == 0) == (bytes == 0), "a tile must have rows and bytes, or neither");
    }
    state.config = config;
    state.configured = true;
    std::memset(state.data, 0, sizeof state.data);
}

void EmulatedTiles::release() {
    state.configured = false;
}

void EmulatedTiles::zero(int tile) {
    require_tile(tile);
    std::memset(state.data[tile], 0, sizeof state.data[tile]);
}

void EmulatedTiles::load(int tile, const void* from, ptrdiff_t stride) {
    require_tile(tile);
    for (int row = 0; row < state.config.rows[tile]; ++row)
        std::memcpy(state.data[tile][row], static_cast<const char*>(from) + row * stride, state.config.row_bytes[tile]);
    clear_past_size(tile);
}

void EmulatedTiles::store(int tile, void* to, ptrdiff_t stride) {
    require_tile(tile);
    for (int row = 0; row < state.config.rows[tile]; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, state.data[tile][row], state.config.row_bytes[tile]);
}

void EmulatedTiles::dot(int c, int a, int b) {
    for (const int tile : {a, b, c}) require_tile(tile);
    require(a != b && a != c && b != c, "tdpbsud must be given three tiles");
    const TileConfig& config = state.config;
    require(config.rows[c] == config.rows[a] && config.row_bytes[c] == config.row_bytes[b] &&
                config.row_bytes[a] == 4 * config.rows[b] && config.row_bytes[c] % 4 == 0,
            "the sizes of tdpbsud's tiles must match");
    for (int m = 0; m < config.rows[c]; ++m) {
        for (int k = 0; k < config.rows[b]; ++k) {
            for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
                uint32_t sum;
                std::memcpy(&sum, &state.data[c][m][4 * n], sizeof sum);
                for (int byte = 0; byte < 4; ++byte) {
                    const int x = static_cast<int8_t>(state.data[a][m][4 * k + byte]),
                              y = state.data[b][k][4 * n + byte];
                    sum += static_cast<uint32_t>(x * y);
                }
                std::memcpy(&state.data[c][m][4 * n], &sum, sizeof sum);
            }
        }
    }
    clear_past_size(c);
}

void tile_product(bool emulated, const TileProduct& args) {
    emulated ? product_of_tiles<EmulatedTiles>(args) : product_of_tiles<AmxTiles>(args);
}

#else

void tile_product(bool, const TileProduct&) {
    throw std::logic_error("tiles are of x86-64 only");
}

#endif

}  // namespace normtweak
