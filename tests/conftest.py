"""What every test runs under: one thread a process, no hub, and Triton in its interpreter, which reads that when imported."""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # 0 on a machine with a GPU, for tests/kernels/test_cuda.py
