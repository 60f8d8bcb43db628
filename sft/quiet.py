"""People see our lines: start-up noise and progress chatter of the libraries is turned off."""

import logging
import os
import warnings

from sft.settings import launched


def silence_libraries() -> None:
    """Call before torch's companions are imported. What the user has set in the environment stays as it is."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "BITSANDBYTES_NOWELCOME": "1",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|transformers|peft|trl|bitsandbytes|accelerate)"
    )
    for name in ("DeepSpeed", "bitsandbytes", "mlflow", "alembic", "accelerate", "torch.distributed", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_torch() -> None:
    """Call after torch and before accelerate: deepspeed would announce the accelerator it found."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # accelerate launch gives each process one thread on the CPU: share the cores instead.
        if (launch := launched()).processes > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_processes))
