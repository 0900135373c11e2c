"""Shapes of models that people run, for programs that are compiled and not run."""

LENGTH, ROWS = 131072, 32
HEADS = {  # query heads, key heads, head width
    "Llama-3.1-8B, Mistral-Nemo-12B": (32, 8, 128),
    "Phi-3.5-mini": (32, 32, 96),
    "Qwen2.5-7B": (28, 4, 128),
    "SmolLM2-135M": (9, 3, 64),
}
