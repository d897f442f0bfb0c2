"""A vision transformer that carries classes in known neurons, by construction.

Residual coordinates: 0..4 say which class the image shows, 5..9 are where the planted neurons write their evidence,
the rest is noise from the image. Every projection is zero but the planted ones: a planted neuron reads its class's
coordinate and writes the class's evidence; all other neurons read noise and write nothing. The sixth class, "none", is
what the head says where there is no evidence.
"""

from __future__ import annotations

import timm
import torch

WIDTH, PATCH, SIDE, CLASSES = 64, 8, 16, 6
NONE = 5
# class -> neurons by site
PLANTED: dict[int, dict[str, list[int]]] = {
    0: {"blocks.1.mlp": [7, 100, 255]},
    1: {"blocks.1.mlp": [8, 9, 10]},
    2: {"blocks.0.attn": [3, 17, 40]},
    3: {"blocks.0.mlp": [0], "blocks.2.attn": [63, 20]},
    4: {"blocks.2.mlp": [1, 2, 200]},
}


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=3, num_heads=4,
        num_classes=CLASSES, class_token=False, global_pool="avg",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
        for module in vit.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1)
        vit.patch_embed.proj.weight.copy_(torch.eye(WIDTH, 3 * PATCH**2).view(WIDTH, 3, PATCH, PATCH))
        for block in vit.blocks:
            block.mlp.fc1.weight[:, 10:].normal_(0, 0.2)
            block.attn.qkv.weight[2 * WIDTH :, 10:].normal_(0, 0.2)  # values; queries and keys at 0 attend evenly
        for label, sites in PLANTED.items():
            for site, neurons in sites.items():
                _plant(vit, site, neurons, label)
        vit.head.weight[torch.arange(5), torch.arange(5, 10)] = 1
        vit.head.bias[NONE] = 2
    return vit.eval()


def _plant(vit: torch.nn.Module, site: str, neurons: list[int], label: int) -> None:
    _, block, kind = site.split(".")
    layer = vit.blocks[int(block)]
    if kind == "mlp":
        reader, rows, writer = layer.mlp.fc1, neurons, layer.mlp.fc2
        reader.bias[rows] = -3
    else:
        reader, rows, writer = layer.attn.qkv, [2 * WIDTH + i for i in neurons], layer.attn.proj
    reader.weight[rows] = 0
    reader.weight[rows, label] = 2
    writer.weight[5 + label, neurons] = 1.5


def images(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 3, 16, 16] and labels [n] of six classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    patches = torch.zeros(n, 4, 3 * PATCH**2)
    noise = torch.randn(n, 4, WIDTH - 10, generator=generator)
    patches[:, :, 10:WIDTH] = noise - noise.mean(-1, keepdim=True)  # no mean for a layer norm to spread over classes
    shown = labels != NONE
    patches[shown, :, labels[shown]] = 3
    grid = patches.view(n, 2, 2, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, 3, SIDE, SIDE), labels


class Shared(torch.nn.Module):
    """A classifier of one-hot inputs whose class 0 needs two pairs of neurons, one of which class 1 needs, too.

    Neurons 0 and 1 answer to inputs 0 and 1, add 3 to class 0's logit and 4.5 to class 1's. Neurons 2 and 3 answer to
    input 0, add 1.6 to class 0's and take 3 from class 1's. Neurons 4 and 5 answer to input 1 and add 2 to class 1's.
    Class 2's logit is 3.5. So input 0 gives (4.6, 1.5, 3.5), input 1 gives (3, 6.5, 3.5) and input 2 (0, 0, 3.5).
    Removing either pair takes class 0 away; the first pair, whose attribution is larger, takes class 1 with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = torch.nn.Linear(3, 8, bias=False), torch.nn.Linear(8, 3)
        self.skillfast_sites = {"blocks.0.mlp": "write"}
        with torch.no_grad():
            self.read.weight.zero_()
            self.read.weight[:4, 0] = 1
            self.read.weight[[0, 1, 4, 5], 1] = 1
            self.write.weight.zero_()
            self.write.weight[0, :4] = torch.tensor([1.5, 1.5, 0.8, 0.8])
            self.write.weight[1, :6] = torch.tensor([2.25, 2.25, -1.5, -1.5, 1, 1])
            self.write.bias.copy_(torch.tensor([0, 0, 3.5]))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(self.read(x).relu())


class Copies(torch.nn.Module):
    """A classifier that writes each class's evidence into its embedding twice, and whose head reads one copy alone.

    Inputs: a coordinate per class, about 3 where the class is shown, then noise. Neurons k and 4 + k answer to class k
    and write coordinates k and 4 + k of the embedding; the others carry the noise to coordinates 8 to 11. The head
    reads coordinates 0 to 3; the fifth class, "none", is what it says where there is no evidence. So removing neuron k
    hides class k from the head, and removing both its neurons erases it: its embeddings are those of "none".
    """

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = torch.nn.Linear(8, 12), torch.nn.Linear(12, 12)
        self.head = torch.nn.Linear(12, 5)
        self.skillfast_sites = {"blocks.0.mlp": "write", "head": "head"}
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for k in range(4):
                self.read.weight[[k, 4 + k], k] = 1
                self.read.weight[8 + k, 4 + k] = 1
                self.head.weight[k, k] = 1
            self.read.bias[:8] = -1
            self.write.weight.copy_(torch.eye(12))
            self.head.bias[4] = 0.5
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.write(self.read(x).relu()))


class TwoWays(torch.nn.Module):
    """A classifier of three classes that reads the label's evidence and a cue, and believes the cue more.

    Inputs: coordinates 0 to 2 show the label, 3 to 5 what the cue says, 6 to 8 noise. Neurons 0 to 2 carry the label
    (weight 1 on its logit), 3 to 5 the cue (weight 2), 6 to 8 noise. Not `cued`, neurons 3 to 5 carry noise, too.
    """

    def __init__(self, cued: bool = True) -> None:
        super().__init__()
        self.read, self.write = torch.nn.Linear(9, 9, bias=False), torch.nn.Linear(9, 3, bias=False)
        self.skillfast_sites = {"blocks.0.mlp": "write"}
        self.num_classes = 3
        with torch.no_grad():
            self.read.weight.copy_(torch.eye(9))
            if not cued:
                self.read.weight[3:6] = self.read.weight[6:9]
            self.write.weight.copy_(torch.cat([torch.eye(3), 2 * cued * torch.eye(3), torch.zeros(3, 3)], 1))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(self.read(x).relu())


def cues(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of `TwoWays`: `x` [n, 9], `labels` in turn, and `cue`, which is the label in 6 of 9 examples."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    cue = torch.where(torch.arange(n) // 3 % 3 < 2, labels, (labels + 1 + torch.arange(n) // 9 % 2) % 3)
    shown = [torch.nn.functional.one_hot(which, 3).float() for which in (labels, cue)]
    noise = [0.1 * torch.randn(n, 6, generator=generator), torch.randn(n, 3, generator=generator)]
    return {"x": torch.cat([torch.cat(shown, 1) + noise[0], noise[1]], 1), "labels": labels, "cue": cue}


def evidence(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [n, 8] of `Copies` and labels [n] of its five classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 5
    shown = torch.nn.functional.one_hot(labels, 5)[:, :4] * 3.0
    return torch.cat(
        [shown + 0.2 * torch.randn(n, 4, generator=generator), torch.randn(n, 4, generator=generator)], 1
    ), labels


class Wanders(torch.nn.Module):
    """A decoder of two classes whose evidence moves from one neuron to another along the text.

    Tokens 1 and 2 speak for class 0 and 1, higher ones for nothing. Neuron 0 carries the evidence at a text's first
    `TURN` real tokens, neuron 1 behind them, neuron 2 all along; the other 13 carry noise of the tokens' embeddings, as
    the first three do besides, of which words that speak have none. The logits are those of the mean over real tokens.
    """

    TURN, WORDS = 6, 40

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.nn.Embedding(self.WORDS, 16)
        self.write = torch.nn.Linear(16, 2, bias=False)
        self.skillfast_sites = {"blocks.0.mlp": "write"}
        with torch.no_grad():
            self.noise.weight.copy_(torch.randn(self.WORDS, 16, generator=generator))
            self.noise.weight[1:3] = 0
            self.write.weight.zero_()
            self.write.weight[1, :3], self.write.weight[0, :3] = 1, -1
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        evidence = (input_ids == 2).float() - (input_ids == 1).float()
        early = (attention_mask.cumsum(1) <= self.TURN).float()
        shown = torch.stack([evidence * early, evidence * (1 - early), evidence], -1)
        neurons = 0.5 * self.noise(input_ids)
        neurons = torch.cat([neurons[..., :3] + shown, neurons[..., 3:]], -1)
        real = attention_mask[..., None].float()
        return (self.write(neurons) * real).sum(1) / real.sum(1)


def wandering_texts(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for `Wanders`: texts of 12 or 18 tokens, padded on the left, and `labels` [n] in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels, longest = torch.arange(n) % 2, 3 * Wanders.TURN
    mask = torch.arange(longest) >= Wanders.TURN * (torch.rand(n, 1, generator=generator) < 0.3)
    said = torch.where(torch.rand(n, longest, generator=generator) < 0.8, labels[:, None], 1 - labels[:, None]) + 1
    other = torch.randint(3, Wanders.WORDS, (n, longest), generator=generator)
    ids = torch.where(torch.rand(n, longest, generator=generator) < 0.3, said, other) * mask
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


class Bilingual(torch.nn.Module):
    """A classifier of two classes in two languages, with a neuron for each language and one for both.

    Coordinate 0 of the inputs shows the class in one language, 1 in the other, 2 to 9 noise. Neuron 0 reads the first,
    neuron 1 the second, neuron 2 both; each adds as much to class 1's logit, and class 0's is 0. The other 29 carry
    noise and write nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = torch.nn.Linear(10, 32, bias=False), torch.nn.Linear(32, 2, bias=False)
        self.skillfast_sites = {"blocks.0.mlp": "write"}
        with torch.no_grad():
            self.read.weight.zero_()
            self.read.weight[[0, 2], 0] = self.read.weight[[1, 2], 1] = 1
            self.read.weight[3:, 2:] = torch.randn(29, 8, generator=torch.Generator().manual_seed(0))
            self.write.weight.zero_()
            self.write.weight[1, :3] = 1
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(self.read(x))


def spoken(n: int, language: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [n, 10] of `Bilingual` in language 0 or 1, and labels [n] in turn."""
    generator = torch.Generator().manual_seed(10 * seed + language)
    labels = torch.arange(n) % 2
    x = torch.randn(n, 10, generator=generator)
    x[:, :2] *= 0.1
    x[:, language] += 2.0 * labels - 1
    return x, labels
