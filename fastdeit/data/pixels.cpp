// Operations on the pixels of one picture, for `fastdeit/data/compiled.py`. Each makes the bytes that `pixel_ops` makes
// with numpy or Pillow, in one call that needs no interpreter, so that threads do not wait for one another.
//
// A picture is uint8 [height, width, channels], its rows one after the other; outputs are written whole. Nothing is
// allocated but rows, and there is nothing of Python here: the interface is plain C.
//
// Sums and products are rounded one by one, as numpy does: compile without contraction (-ffp-contract=off).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// A version for AVX2 beside that for every processor; the loader takes the one that runs.
#if defined(__x86_64__) && defined(__linux__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define WIDE __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef WIDE
#define WIDE
#endif

using Byte = std::uint8_t;

namespace {

// trunc(clip(below + factor (level - below), 0, 255))
inline Byte blended(float below, Byte level, float factor) {
    float value = static_cast<float>(level);
    value -= below;
    value *= factor;
    value += below;
    value = value < 0.0f ? 0.0f : value;
    value = value > 255.0f ? 255.0f : value;
    return static_cast<Byte>(static_cast<int>(value));
}

// ITU-R 601-2 luma in 16-bit fixed point, as Pillow has it
inline Byte luma(const Byte* pixel) {
    return static_cast<Byte>((pixel[0] * 19595u + pixel[1] * 38470u + pixel[2] * 7471u + 0x8000u) >> 16);
}

// The radius of the box that blurs three times as a Gaussian of standard deviation `sigma` does (Gwosdek et al., 2011),
// in the precision of each step that Pillow has
float box_radius(float sigma) {
    const float variance = sigma * sigma / 3;
    const float length = static_cast<float>(std::sqrt(12.0 * variance + 1.0));
    const float whole = static_cast<float>(std::floor((length - 1.0) / 2.0));
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
    part /= 6 * (variance - (whole + 1) * (whole + 1));
    return whole + part;
}

// A box that reaches `reach` whole pixels to either side, each with the weight `inner`, and a pixel further with
// `outer`; weights are integers, of which 1 << 24 stands for 1
struct Box {
    int reach;
    std::uint32_t inner, outer;

    explicit Box(float radius) : reach(static_cast<int>(radius)) {
        inner = static_cast<std::uint32_t>(static_cast<float>(1u << 24) / (radius * 2 + 1));
        outer = ((1u << 24) - (reach * 2 + 1) * inner) / 2;
    }
};

// One pass over `count` values: of each the box along `step`, from `line`, which goes on for `reach + 1` steps beyond
// both ends; `sums` has room for `count`
WIDE void box_row(const Byte* line, Byte* out, long count, long step, Box box, std::uint32_t* sums) {
    for (long i = 0; i < count; ++i) sums[i] = line[i];
    for (long k = 1; k <= box.reach; ++k)
        for (long i = 0; i < count; ++i) sums[i] += static_cast<std::uint32_t>(line[i - k * step]) + line[i + k * step];
    const long far = (box.reach + 1) * step;
    for (long i = 0; i < count; ++i) {
        const std::uint32_t ends = static_cast<std::uint32_t>(line[i - far]) + line[i + far];
        out[i] = static_cast<Byte>((sums[i] * box.inner + ends * box.outer + (1u << 23)) >> 24);
    }
}

// One pass down the columns of `rows`, pointers to the rows of the box from the one above it to the one below it
WIDE void box_column(const Byte* const* rows, Byte* out, long count, Box box, std::uint32_t* sums) {
    const long most = 2 * box.reach + 2;
    std::memset(sums, 0, count * sizeof *sums);
    for (long k = 1; k < most; ++k)
        for (long i = 0; i < count; ++i) sums[i] += rows[k][i];
    const Byte *above = rows[0], *below = rows[most];
    for (long i = 0; i < count; ++i) {
        const std::uint32_t ends = static_cast<std::uint32_t>(above[i]) + below[i];
        out[i] = static_cast<Byte>((sums[i] * box.inner + ends * box.outer + (1u << 23)) >> 24);
    }
}

// Four pixels in a row of each value, and the cubic (coefficient -1) at `t` beyond the second
inline Byte cubic(Byte before, Byte from, Byte to, Byte after, float t) {
    const float first = static_cast<float>(from) - before, second = static_cast<float>(to) - from;
    const float third = static_cast<float>(after) - to;
    float coefficient = first + third;
    float value = coefficient * t;
    coefficient += first;
    value -= coefficient;
    value *= t;
    coefficient = first + second;
    value += coefficient;
    value *= t;
    value += from;
    value = value < 0.0f ? 0.0f : value;
    value = value > 255.0f ? 255.0f : value;
    return static_cast<Byte>(static_cast<int>(value));
}

WIDE void cubic_row(const Byte* a, const Byte* b, const Byte* c, const Byte* e, Byte* out, long count, float t) {
    for (long i = 0; i < count; ++i) out[i] = cubic(a[i], b[i], c[i], e[i], t);
}

// With a `t` for each value
WIDE void cubic_rows(const Byte* const* rows, Byte* out, long count, const float* t) {
    const Byte *a = rows[0], *b = rows[1], *c = rows[2], *e = rows[3];
    for (long i = 0; i < count; ++i) out[i] = cubic(a[i], b[i], c[i], e[i], t[i]);
}

WIDE void luma_row(const Byte* image, Byte* out, long pixels) {
    for (long i = 0; i < pixels; ++i) out[i] = luma(image + 3 * i);
}

WIDE void blend_row(const Byte* below, const Byte* image, Byte* out, long count, float factor) {
    for (long i = 0; i < count; ++i) out[i] = blended(static_cast<float>(below[i]), image[i], factor);
}

inline long within(long index, long length) { return std::clamp(index, 0L, length - 1); }

}  // namespace

extern "C" {

// image [pixels, 3] -> out [pixels]
void fastdeit_grey(const Byte* image, Byte* out, long pixels) { luma_row(image, out, pixels); }

// grey [pixels] -> out [pixels, 3]
WIDE void fastdeit_three(const Byte* grey, Byte* out, long pixels) {
    for (long i = 0; i < pixels; ++i) out[3 * i] = out[3 * i + 1] = out[3 * i + 2] = grey[i];
}

// sum of `count` values
WIDE long fastdeit_sum(const Byte* image, long count) {
    long total = 0;
    for (long begin = 0; begin < count; begin += 1 << 16) {
        const long end = std::min(count, begin + (1 << 16));
        std::uint32_t part = 0;
        for (long i = begin; i < end; ++i) part += image[i];
        total += part;
    }
    return total;
}

// image, out [count]: the blend of every value with the same one
WIDE void fastdeit_blend_level(const Byte* image, Byte* out, long count, float below, float factor) {
    for (long i = 0; i < count; ++i) out[i] = blended(below, image[i], factor);
}

// image, out [pixels, 3]: the blend of every pixel with its grey
void fastdeit_color(const Byte* image, Byte* out, long pixels, float factor) {
    constexpr long part = 1024;
    Byte grey[part], base[3 * part];
    for (long begin = 0; begin < pixels; begin += part) {
        const long count = std::min(part, pixels - begin);
        luma_row(image + 3 * begin, grey, count);
        fastdeit_three(grey, base, count);
        blend_row(base, image + 3 * begin, out + 3 * begin, 3 * count, factor);
    }
}

// image, out [height, width, 3]: every row from right to left
void fastdeit_flip(const Byte* image, Byte* out, long height, long width) {
    for (long y = 0; y < height; ++y) {
        const Byte* from = image + 3 * width * y;
        Byte* to = out + 3 * width * y;
        // Four bytes at a time: the fourth is written again by the next pixel. The outermost would leave the row.
        std::memcpy(to, from + 3 * (width - 1), 3);
        for (long x = 1; x < width - 1; ++x) std::memcpy(to + 3 * x, from + 3 * (width - 1 - x), 4);
        if (width > 1) std::memcpy(to + 3 * (width - 1), from, 3);
    }
}

// image, out [height, width, 3]: Pillow's GaussianBlur(sigma), three boxes along the rows and three along the columns
void fastdeit_blur(const Byte* image, Byte* out, long height, long width, float sigma) {
    const long count = 3 * width;
    const float radius = box_radius(sigma);
    std::memcpy(out, image, height * count);
    if (radius == 0) return;
    const Box box(radius);
    const long margin = 3 * (box.reach + 1);
    std::vector<std::uint32_t> sums(count);
    std::vector<Byte> padded(count + 2 * margin);
    Byte* line = padded.data() + margin;
    for (long y = 0; y < height; ++y) {
        Byte* row = out + y * count;
        for (int pass = 0; pass < 3; ++pass) {
            std::memcpy(line, row, count);
            for (long i = 0; i < margin; ++i) {
                padded[i] = row[i % 3];
                line[count + i] = row[count - 3 + i % 3];
            }
            box_row(line, row, count, 3, box, sums.data());
        }
    }
    std::vector<Byte> other(height * count);
    std::vector<const Byte*> rows(2 * box.reach + 3);
    Byte *from = out, *to = other.data();
    for (int pass = 0; pass < 3; ++pass) {
        for (long y = 0; y < height; ++y) {
            for (long k = 0; k < static_cast<long>(rows.size()); ++k)
                rows[k] = from + within(y + k - box.reach - 1, height) * count;
            box_column(rows.data(), to + y * count, count, box, sums.data());
        }
        std::swap(from, to);
    }
    std::memcpy(out, from, height * count);
}

// image, out [height, width, 3]: the blend of every pixel with Pillow's SMOOTH of it; the border stays
WIDE void fastdeit_sharpness(const Byte* image, Byte* out, long height, long width, float factor) {
    const long count = 3 * width;
    std::vector<Byte> smooth(count);
    std::vector<std::uint16_t> sums(count);
    for (long y = 0; y < height; ++y) {
        const Byte* line = image + y * count;
        std::memcpy(smooth.data(), line, count);
        if (y > 0 && y < height - 1) {
            const Byte *above = line - count, *below = line + count;
            for (long i = 0; i < count; ++i) sums[i] = static_cast<std::uint16_t>(above[i] + line[i] + below[i]);
            for (long i = 3; i < count - 3; ++i) {
                const unsigned total = sums[i - 3] + sums[i] + sums[i + 3] + 4u * line[i] + 6u;
                smooth[i] = static_cast<Byte>(total / 13u);
            }
        }
        blend_row(smooth.data(), line, out + y * count, count, factor);
    }
}

// image, out [height, width, 3]: pixel i of row j is the input's at i + whole[j] + t[j], for first[j] <= i < last[j],
// and `fill` elsewhere
void fastdeit_move_rows(const Byte* image, Byte* out, long height, long width, const std::int64_t* whole,
                        const float* t, const std::int64_t* first, const std::int64_t* last, const Byte* fill) {
    const long count = 3 * width;
    std::vector<Byte> padded(count + 15);
    Byte* line = padded.data() + 6;  // two pixels before, and three behind
    for (long y = 0; y < height; ++y) {
        const Byte* row = image + y * count;
        Byte* to = out + y * count;
        std::memcpy(line, row, count);
        for (long i = 0; i < 9; ++i) {
            if (i < 6) padded[i] = row[i % 3];
            line[count + i] = row[count - 3 + i % 3];
        }
        for (long x = 0; x < first[y]; ++x) std::memcpy(to + 3 * x, fill, 3);
        for (long x = last[y]; x < width; ++x) std::memcpy(to + 3 * x, fill, 3);
        if (first[y] >= last[y]) continue;
        const Byte* from = line + 3 * (first[y] + whole[y]);
        cubic_row(from - 3, from, from + 3, from + 6, to + 3 * first[y], 3 * (last[y] - first[y]), t[y]);
    }
}

// The same down the columns, with a value of `whole`, `t`, `first` and `last` for each column
void fastdeit_move_columns(const Byte* image, Byte* out, long height, long width, const std::int64_t* whole,
                           const float* t, const std::int64_t* first, const std::int64_t* last, const Byte* fill) {
    const long count = 3 * width;
    std::vector<float> beyond(count);
    for (long i = 0; i < count; ++i) beyond[i] = t[i / 3];
    for (long left = 0; left < width;) {
        long right = left + 1;  // columns that are moved by the same whole pixels
        while (right < width && whole[right] == whole[left]) ++right;
        // In eights, which are made at once; what is too much is made again with the next columns.
        const long some = std::min((3 * (right - left) + 7) / 8 * 8, 3 * (width - left));
        for (long y = 0; y < height; ++y) {
            const Byte* rows[4];
            for (long k = 0; k < 4; ++k) rows[k] = image + within(y + whole[left] + k - 1, height) * count + 3 * left;
            cubic_rows(rows, out + y * count + 3 * left, some, beyond.data() + 3 * left);
        }
        left = right;
    }
    for (long y = 0; y < height; ++y)
        for (long x = 0; x < width; ++x)
            if (y < first[x] || y >= last[x]) std::memcpy(out + y * count + 3 * x, fill, 3);
}

// Digest of this file as it was compiled
const char* fastdeit_source() { return FASTDEIT_SOURCE; }

}  // extern "C"
