"""LLaMA-Factory's training with LoRA ranks chosen from the data: python examples/llama_factory.py config.yaml

Takes what `llamafactory-cli train` takes, in one process: a YAML or JSON file, and key=value after it.
"""

from llamafactory.train.tuner import run_exp

from gelora_plugins import GeLoRACallback, GeLoRAConfig

if __name__ == "__main__":
    run_exp(callbacks=[GeLoRACallback(GeLoRAConfig(policy="budget"))])
