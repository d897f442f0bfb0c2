from __future__ import annotations

import platform


def pytest_benchmark_update_machine_info(machine_info):
    """What a figure needs beside it: device, versions, threads, instruction set."""
    import torch

    import skillfast
    from skillfast import backends

    machine_info.pop("node", None)  # whose machine it was is nobody's business
    machine_info["skillfast"] = {
        "version": skillfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "backends": backends.status(),
    }
