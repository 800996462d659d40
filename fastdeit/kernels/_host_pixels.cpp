// The arithmetic of `_host_pixels.py` in one pass each, with its roundings: every product and every sum is rounded to
// float32 by itself, so compile without contraction (-ffp-contract=off). Plain C, without Python.

#include <algorithm>
#include <cstdint>

// A version for AVX2 beside that for every processor; the loader takes the one that runs.
#if defined(__x86_64__) && defined(__linux__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define WIDE __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef WIDE
#define WIDE
#endif

extern "C" {

// image uint8 [height, width, 3], rows `pitch` bytes apart -> out[c][y][x] = image[y][x][c] * scale[c] - shift[c], whose
// channels are `plane` and rows `row` values apart
WIDE void fastdeit_normalise(const std::uint8_t* image, long pitch, float* out, long plane, long row, long height,
                             long width, const float* scale, const float* shift) {
    constexpr long part = 1024;
    std::uint8_t channels[3][part];
    for (long y = 0; y < height; ++y) {
        for (long begin = 0; begin < width; begin += part) {
            const long count = std::min(part, width - begin);
            const std::uint8_t* pixel = image + y * pitch + 3 * begin;
            for (long x = 0; x < count; ++x)
                for (long c = 0; c < 3; ++c) channels[c][x] = pixel[3 * x + c];
            for (long c = 0; c < 3; ++c) {
                float* to = out + c * plane + y * row + begin;
                for (long x = 0; x < count; ++x) to[x] = channels[c][x] * scale[c] - shift[c];
            }
        }
    }
}

// own = own * weight + other * rest, of `count` values
WIDE void fastdeit_mix(float* own, const float* other, long count, float weight, float rest) {
    for (long i = 0; i < count; ++i) own[i] = own[i] * weight + other[i] * rest;
}

// Digest of this file as it was compiled
const char* fastdeit_source() { return FASTDEIT_SOURCE; }

}  // extern "C"
