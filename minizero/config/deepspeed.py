"""stub: the translation follows"""

TOP_LEVEL_KEYS = frozenset({"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"})


def translate(tree):
    raise NotImplementedError


def from_deepspeed(source):
    from minizero.config.schema import Config

    c = source
    return Config(
        train=dict(micro_batch_size=c["train_micro_batch_size_per_gpu"], gradient_clipping=c["gradient_clipping"]),
        optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.01),
        zero=c["zero_optimization"],
    )
