"""What 512 GPUs would cost, simulated on one machine (docs/scale.md)."""
