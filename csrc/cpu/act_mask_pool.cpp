#include "cpu/pooling.h"

namespace skillfast::SKILLFAST_ISA {
namespace {

template <typename T, typename S>
void items(const ActPoolArgs& args, int64_t begin, int64_t end) {
  const int64_t panels = (args.flow.width + kActPanel - 1) / kActPanel;
  S* pooled = static_cast<S*>(args.pooled);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / panels, d0 = item % panels * kActPanel, left = args.flow.width - d0;
    S* row = pooled == nullptr ? nullptr : pooled + sample * args.flow.width + d0;
    S* squares = args.pool == Pool::moments ? row + args.flow.batch * args.flow.width : nullptr;
    pool_panel<T, S>(args, sample, d0, left < kActPanel ? left : kActPanel, row, squares);
  }
}

}  // namespace

void act_pool_items(const ActPoolArgs& args, int64_t begin, int64_t end) {
  by_type(args.flow.dtype, [&](auto x, auto s) { items<decltype(x), decltype(s)>(args, begin, end); });
}

}  // namespace skillfast::SKILLFAST_ISA
