"""GeLoRA in ms-swift, which imports this file and takes the callback by its name:

swift sft --external_plugins examples/ms_swift.py --callbacks gelora --model MODEL --dataset train.jsonl \
  --tuner_type lora --lora_rank 8 --lora_alpha 16 --target_modules all-linear
"""

from swift.callbacks import callbacks_map

from gelora_plugins import GeLoRACallback, GeLoRAConfig


def make_callback(args, trainer):
    return GeLoRACallback(GeLoRAConfig(policy="budget"))


callbacks_map["gelora"] = make_callback
