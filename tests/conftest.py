"""What every test runs under: one thread a process, no hub, and Triton in its interpreter, which reads that when imported."""

import os

os.environ.update(
    OMP_NUM_THREADS="1", TRITON_INTERPRET="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)
