"""llmwd: a vLLM server on a Slurm node's idle GPUs that gets out of every Slurm job's way."""

__version__ = "0.1.0"
