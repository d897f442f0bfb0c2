#include "cpu/isa.h"

namespace skillfast::SKILLFAST_ISA {
namespace {

constexpr int kLanes = SKILLFAST_VECTOR_BYTES / sizeof(float);
constexpr int kRows = 8;     // rows summed in float32 before they are added to the float64 sums
constexpr int kColumns = 6;  // columns of y in one sweep over a tile: 6 + 2 sums, x and y fit AVX2's 16 registers
constexpr int kPanel = 256;  // neurons whose kRows rows stay in cache for all columns

typedef float VecF __attribute__((vector_size(SKILLFAST_VECTOR_BYTES)));

// kRows rows of a panel as shifted float32, rows padded to kPanel with zeros.
template <typename T>
void load_panel(const CoMomentsArgs& args, int64_t row0, int rows, int64_t d0, int width, float* __restrict panel) {
  for (int r = 0; r < rows; ++r) {
    const T* __restrict x = static_cast<const T*>(args.x) + (row0 + r) * args.stride_row + d0;
    const float* __restrict shift = args.shift + d0;
    float* __restrict out = panel + r * kPanel;
    for (int d = 0; d < width; ++d) out[d] = to_float(x[d]) - shift[d];
    for (int d = width; d < kPanel; ++d) out[d] = 0.0f;
  }
}

void add_lanes(double* __restrict sums, const VecF& values) {
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] += static_cast<double>(values[lane]);
}

// Sums x and x^2 of one vector of neurons over the panel's rows.
void sum_squares(const float* panel, int rows, double* sum_x, double* sum_xx) {
  VecF sum = {}, squares = {};
  for (int r = 0; r < rows; ++r) {
    VecF x;
    std::memcpy(&x, panel + r * kPanel, sizeof(x));
    sum += x;
    squares += x * x;
  }
  add_lanes(sum_x, sum);
  add_lanes(sum_xx, squares);
}

template <int columns>
void sum_products(const float* panel, const float* y, int64_t y_stride, int rows, double* sum_xy) {
  VecF sums[columns] = {};
  for (int r = 0; r < rows; ++r) {
    VecF x;
    std::memcpy(&x, panel + r * kPanel, sizeof(x));
    for (int m = 0; m < columns; ++m) sums[m] += x * y[r * y_stride + m];
  }
  for (int m = 0; m < columns; ++m) add_lanes(sum_xy + m * kPanel, sums[m]);
}

void sum_products_any(int columns, const float* panel, const float* y, int64_t y_stride, int rows, double* sum_xy) {
  switch (columns) {
    case 1:
      return sum_products<1>(panel, y, y_stride, rows, sum_xy);
    case 2:
      return sum_products<2>(panel, y, y_stride, rows, sum_xy);
    case 3:
      return sum_products<3>(panel, y, y_stride, rows, sum_xy);
    case 4:
      return sum_products<4>(panel, y, y_stride, rows, sum_xy);
    case 5:
      return sum_products<5>(panel, y, y_stride, rows, sum_xy);
    default:
      return sum_products<kColumns>(panel, y, y_stride, rows, sum_xy);
  }
}

// Adds one panel of neurons, `columns` of y at a time; local float64 sums are written to the state once.
template <typename T>
void panel_update(const CoMomentsArgs& args, int64_t d0, int width) {
  alignas(64) float panel[kRows * kPanel];
  alignas(64) double local_x[kPanel] = {}, local_xx[kPanel] = {};
  const bool narrow = args.columns <= 2 * kColumns;
  alignas(64) double local_xy[2 * kColumns * kPanel] = {};
  for (int64_t row0 = 0; row0 < args.n; row0 += kRows) {
    const int rows = args.n - row0 < kRows ? static_cast<int>(args.n - row0) : kRows;
    load_panel<T>(args, row0, rows, d0, width, panel);
    for (int d = 0; d < width; d += kLanes) sum_squares(panel + d, rows, local_x + d, local_xx + d);
    for (int64_t m0 = 0; m0 < args.columns; m0 += kColumns) {
      const int columns = args.columns - m0 < kColumns ? static_cast<int>(args.columns - m0) : kColumns;
      const float* y = args.y + row0 * args.columns + m0;
      double* sums = narrow ? local_xy + m0 * kPanel : local_xy;
      for (int d = 0; d < width; d += kLanes) sum_products_any(columns, panel + d, y, args.columns, rows, sums + d);
      if (narrow) continue;
      for (int m = 0; m < columns; ++m) {
        double* state = args.sum_xy + (m0 + m) * args.stride_xy + d0;
        for (int d = 0; d < width; ++d) state[d] += sums[m * kPanel + d];
      }
      std::memset(local_xy, 0, sizeof(double) * kColumns * kPanel);
    }
  }
  for (int d = 0; d < width; ++d) {
    args.sum_x[d0 + d] += local_x[d];
    args.sum_xx[d0 + d] += local_xx[d];
  }
  if (!narrow) return;
  for (int64_t m = 0; m < args.columns; ++m) {
    double* state = args.sum_xy + m * args.stride_xy + d0;
    for (int d = 0; d < width; ++d) state[d] += local_xy[m * kPanel + d];
  }
}

template <typename T>
void lanes(const CoMomentsArgs& args, int64_t begin, int64_t end) {
  for (int64_t d0 = begin; d0 < end; d0 += kPanel) {
    panel_update<T>(args, d0, end - d0 < kPanel ? static_cast<int>(end - d0) : kPanel);
  }
}

}  // namespace

void comoments_lanes(const CoMomentsArgs& args, int64_t begin, int64_t end) {
  by_type(args.dtype, [&](auto x, auto) { lanes<decltype(x)>(args, begin, end); });
}

}  // namespace skillfast::SKILLFAST_ISA
