"""Small models with awkward shapes, and the plain one-process training they are compared with."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, LENGTH, BATCH = 17, 15, 7, 16


class Block(nn.Module):
    """Norm and MLP, odd sizes, one bias missing."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Toy(nn.Module):
    """Embedding, blocks, norm, head; subclasses bend `run_blocks`."""

    tied = True
    depth = 3

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(self.depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if self.tied:
            self.head.weight = self.embed.weight

    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(self.run_blocks(self.embed(tokens))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Frozen(Toy):
    """A block and a norm weight that do not train, and a bias inside a block."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in [*self.blocks[1].parameters(), self.norm.weight, self.blocks[0].up.bias]:
            parameter.requires_grad_(False)


class LoRABlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(self.a(x))


class Adapters(Toy):
    """A frozen base with trainable low-rank matrices in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LoRABlock() for _ in range(self.depth))
        self.embed.requires_grad_(False)
        self.norm.requires_grad_(False)


class Unused(Toy):
    """A whole block and half of another are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].extra = nn.Linear(WIDTH, WIDTH)

    def run_blocks(self, x: Tensor) -> Tensor:
        return self.blocks[2](self.blocks[0](x))


class Twice(Toy):
    """Blocks run out of order, and one of them twice."""

    def run_blocks(self, x: Tensor) -> Tensor:
        for index in (2, 0, 1, 0):
            x = self.blocks[index](x)
        return x


class Nested(Toy):
    """Containers inside containers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(Block(), nn.ModuleDict({"x": Block()})["x"]) for _ in range(2)])


class Outside(Toy):
    """The head reads the untied embedding's weight, and the root reads a weight inside a block."""

    tied = False

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.run_blocks(self.embed(tokens))
        x = x + F.linear(x, self.blocks[0].up.weight[:WIDTH])
        logits = F.linear(self.norm(x), self.embed.weight) + self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class AuxiliaryBlock(Block):
    """Leaves a loss of its own behind, which reaches the root's around its output."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.aux = self.up(x).pow(2).mean() + self.down.weight.pow(2).mean()  # backward comes here before `out`
        return out


class Auxiliary(Toy):
    """Blocks with auxiliary losses, as mixtures of experts have them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AuxiliaryBlock() for _ in range(self.depth))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(tokens, labels)
        return loss + sum(block.aux for block in self.blocks)


class BigEmbedding(Toy):
    """The embedding is larger than a block, so it is a unit of its own."""

    tied = False

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.embed = nn.Embedding(500, WIDTH)


class TransposedHead(BigEmbedding):
    """The head is the embedding's transpose, taken by hand."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.norm(self.run_blocks(self.embed(tokens))) @ self.embed.weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Recomputed(Toy):
    """Blocks under torch's non-reentrant activation checkpointing."""

    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Encoder(nn.Module):
    """torch's own transformer encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(self.embed(tokens))).flatten(0, 1), labels.flatten())


class TwoDtypes(Toy):
    """Float64 blocks in a float32 model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].double()

    def run_blocks(self, x: Tensor) -> Tensor:
        return self.blocks[2](self.blocks[1](self.blocks[0](x).double()).float())


def hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    return HuggingFace(LlamaForCausalLM(config))


def hf_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=12,
        n_layer=3,
        n_head=3,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return HuggingFace(GPT2LMHeadModel(config))


class HuggingFace(nn.Module):
    """Gives a transformers model our toys' signature."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(input_ids=tokens).logits.flatten(0, 1), labels.flatten())


def hf_llama_recomputed() -> nn.Module:
    model = hf_llama()
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "toy": Toy,
    "frozen": Frozen,
    "adapters": Adapters,
    "unused": Unused,
    "twice": Twice,
    "nested": Nested,
    "outside": Outside,
    "big_embedding": BigEmbedding,
    "auxiliary": Auxiliary,
    "transposed_head": TransposedHead,
    "recomputed": Recomputed,
    "encoder": Encoder,
    "two_dtypes": TwoDtypes,
    "hf_llama": hf_llama,
    "hf_gpt2": hf_gpt2,
    "hf_llama_recomputed": hf_llama_recomputed,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    random.seed(0)
    return MODELS[name]()


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Global batches [BATCH, LENGTH], the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(VOCAB, (2, BATCH, LENGTH), generator=generator)) for _ in range(steps)]  # type: ignore[misc]


def train_plainly(
    name: str, steps: int, *, lr: float = 3e-3, clip: float = 0.5, weight_decay: float = 0.1, dtype: Any = None
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """(losses, grad norms before clipping, final weights) of torch alone: one process, AdamW, clip_grad_norm_."""
    model = make(name)
    if dtype is not None:
        model = model.to(dtype)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay)
    losses, norms = [], []
    model.train()
    for tokens, labels in batches(steps):
        loss = model(tokens, labels)
        loss.backward()
        for parameter in trainable:  # minizero counts a missing gradient as zero, since another rank may have one
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable, clip, foreach=False)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, {n: p.detach() for n, p in model.named_parameters()}
