HAS_CUDA: bool

def neuron_scale(
    x: int,
    stride_batch: int,
    stride_token: int,
    batch: int,
    tokens: int,
    width: int,
    scale: int,
    shift: int,
    condition: int,
    out: int,
    dtype: int,
    n_threads: int,
) -> None: ...
def neuron_scale_cuda(
    x: int,
    stride_batch: int,
    stride_token: int,
    batch: int,
    tokens: int,
    width: int,
    scale: int,
    shift: int,
    condition: int,
    out: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
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
def cells_update(
    x: int,
    stride_row: int,
    n: int,
    width: int,
    cells: int,
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
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> bool: ...
def cpu_threads_runtime() -> str: ...
