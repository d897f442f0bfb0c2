HAS_CUDA: bool

_Flow = tuple[int, int, int, int, int, int, int, int]
"""x, stride_batch, stride_token, batch, tokens, width, out (0: not written), dtype; addresses are those of data."""

def neuron_scale(flow: _Flow, scale: int, shift: int, condition: int, n_threads: int) -> None: ...
def neuron_scale_cuda(flow: _Flow, scale: int, shift: int, condition: int, stream: int) -> None: ...
def comoments_update(
    x: int,
    stride_row: int,
    n: int,
    width: int,
    columns: int,
    y: int,
    shift: int,
    sum_x: int,
    sum_xx: int,
    sum_xy: int,
    dtype: int,
    n_threads: int,
) -> None: ...
def bins_update(
    x: int,
    stride_row: int,
    n: int,
    width: int,
    bins: int,
    metrics: int,
    counts: int,
    weights: int,
    edges: int,
    channels: int,
    hats: int,
    table: int,
    dtype: int,
    n_threads: int,
) -> None: ...
def bins_update_cuda(
    x: int,
    stride_row: int,
    n: int,
    width: int,
    bins: int,
    metrics: int,
    counts: int,
    weights: int,
    edges: int,
    channels: int,
    hats: int,
    table: int,
    dtype: int,
    stream: int,
) -> None: ...
def act_mask_pool(
    flow: _Flow, activation: int, pool: int, mask: int, center: int, pooled: int, n_threads: int
) -> None: ...
def act_pool_accumulate(
    flow: _Flow,
    activation: int,
    mask: int,
    y_per_token: bool,
    columns: int,
    y: int,
    center: int,
    sum_x: int,
    sum_xx: int,
    sum_xy: int,
    n_threads: int,
) -> None: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> bool: ...
def cpu_threads_runtime() -> str: ...
