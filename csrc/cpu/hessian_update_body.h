#include "gemm_body.h"
