"""The PyTorch peer of the benchmark: HLIP from `timm` blocks and the `BertModel` of `transformers`, and its loader.

Written from the specification (arXiv 2505.21862 and the released checkpoints), as one would write it: fused attention
(`scaled_dot_product_attention`), fused AdamW, studies padded to the longest of their batch by repeating scans. Its
state dict has the published names, so that both sides can have the same weights.

`python -m tests.benchmarks.torch_hlip JOB` is the worker process of `tests.benchmarks.hlip`.
"""

import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertModel

from tests.benchmarks import work
from tests.benchmarks.worker import serve


class Trunk(nn.Module):
    """Class tokens are averaged where groups merge and copied where they split."""

    def __init__(self, width: int, heads: int, levels: tuple[str, ...], img_size, patch):
        super().__init__()
        self.levels = levels
        grid = [n // p for n, p in zip(img_size, patch)]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(1, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.spatial_posemb = nn.Parameter(torch.zeros(1, *grid, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)) for _ in levels
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(b, s, 1, d, h, w) normalised voxels to (b, e)."""
        b, s = image.shape[:2]
        x = self.patch_embed["proj"](image.flatten(0, 1)).permute(0, 2, 3, 4, 1)
        x = x + self.spatial_posemb
        groups = {"slice": b * s * x.shape[1], "scan": b * s, "study": b}
        x = x.reshape(groups[self.levels[0]], -1, x.shape[-1])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for level, block in zip(self.levels, self.blocks):
            x = block(self.move(x, groups[level]))
        return self.norm(self.move(x, b))[:, 0]

    @staticmethod
    def move(x: torch.Tensor, groups: int) -> torch.Tensor:
        if len(x) == groups:
            return x
        token, patches = x[:, :1], x[:, 1:].reshape(groups, -1, x.shape[-1])
        if len(x) > groups:
            token = token.reshape(groups, -1, 1, x.shape[-1]).mean(1)
        else:
            token = token.repeat_interleave(groups // len(x), dim=0)
        return torch.cat([token, patches], dim=1)


class Vision(nn.Module):
    def __init__(self, out_dim: int, width: int, **trunk):
        super().__init__()
        self.trunk = Trunk(width, **trunk)
        self.head = nn.ModuleDict({"proj": nn.Linear(width, out_dim, bias=False)})

    def forward(self, image):
        return self.head["proj"](self.trunk(image))


class Text(nn.Module):
    def __init__(self, out_dim: int, **config):
        super().__init__()
        config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config)
        self.transformer = BertModel(config, add_pooling_layer=False)
        self.proj = nn.Linear(config.hidden_size, out_dim, bias=False)

    def forward(self, ids):
        hidden = self.transformer(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        return self.proj(hidden[:, 0])


class Hlip(nn.Module):
    def __init__(self):
        super().__init__()
        image, text = work.IMAGE, work.TEXT
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        self.visual = Vision(
            out_dim=image["out_dim"],
            width=image["width"],
            heads=image["heads"],
            levels=image["levels"] * (image["depth"] // len(image["levels"])),
            img_size=image["img_size"],
            patch=image["patch"],
        )
        self.text = Text(
            out_dim=text["out_dim"],
            vocab_size=text["vocab_size"],
            hidden_size=text["width"],
            num_hidden_layers=text["depth"],
            num_attention_heads=text["heads"],
            intermediate_size=text["mlp_width"],
            max_position_embeddings=text["max_positions"],
        )

    def forward(self, image, ids):
        return F.normalize(self.visual(image), dim=-1), F.normalize(self.text(ids), dim=-1)

    def loss(self, image, text):
        logits = self.logit_scale.exp() * image @ text.T
        target = torch.arange(len(logits))
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def normalise(voxels: torch.Tensor) -> torch.Tensor:
    """uint8 to what the model takes, as the reference's loader does it."""
    return (voxels.float() / 255.0 - work.PIXEL_MEAN) / work.PIXEL_STD


# ---- Training.


def collate(studies: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scans repeated to the longest study of the batch."""
    longest = max(len(s["scans"]) for s in studies)
    image = [np.stack([s["scans"][i % len(s["scans"])] for i in range(longest)]) for s in studies]
    image = normalise(torch.from_numpy(np.stack(image)))[:, :, None]
    return image, torch.from_numpy(np.stack([s["ids"] for s in studies])).long()


class Trainer:
    def __init__(self, job: dict):
        torch.manual_seed(0)
        self.dtype = {"float32": None, "bfloat16": torch.bfloat16}[job["dtype"]]
        self.model = Hlip()
        decay = [p for p in self.model.parameters() if p.requires_grad and p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.requires_grad and p.ndim < 2]
        o = work.OPTIM
        groups = [{"params": decay, "weight_decay": o["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, work.LR, (o["b1"], o["b2"]), o["eps"], fused=True)

    def check(self, file: str) -> dict:
        """Features, loss and gradients with the weights and the batch of the other side."""
        other = np.load(file)
        state = {k.removeprefix("w:"): torch.from_numpy(other[k]) for k in other.files if k.startswith("w:")}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        missing = [k for k in missing if "position_ids" not in k and "token_type_ids" not in k]
        if missing or unexpected:
            raise ValueError(f"weights: missing {missing}, unexpected {unexpected}")
        image, text = self.model(
            normalise(torch.from_numpy(other["image"]))[:, :, None], torch.from_numpy(other["text"]).long()
        )
        loss = self.model.loss(image, text)
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.sqrt(sum((g * g).sum() for g in grads)))
        self.optimiser.zero_grad()
        image, text, loss = (x.detach() for x in (image, text, loss))
        return {
            "features": max(
                float((image - torch.from_numpy(other["zimg"])).abs().max()),
                float((text - torch.from_numpy(other["ztxt"])).abs().max()),
            ),
            "loss": abs(float(loss) - float(other["loss"])),
            "grad_norm": abs(norm - float(other["grad_norm"])) / norm,
        }

    def build(self) -> None:
        """Nothing is compiled."""

    def prepare(self, kind: str, epoch: int) -> list:
        studies = work.studies(kind)
        order = np.random.default_rng((1, epoch)).permutation(len(studies))
        return [collate([studies[i] for i in order[k : k + work.BATCH]]) for k in range(0, len(order), work.BATCH)]

    def step(self, batch) -> torch.Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            loss = self.model.loss(*self.model(*batch))
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, np.log(100))
        return loss

    def finish(self, loss) -> float:
        return float(loss.detach())


# ---- Loading.


class Files(Dataset):
    """One `.pt` of uint8 per scan, as in the published data; a study is read, converted and normalised."""

    def __init__(self, studies: list[list[str]]):
        self.studies = studies

    def __len__(self):
        return len(self.studies)

    def __getitem__(self, i):
        return torch.stack([normalise(torch.load(path, weights_only=True)) for path in self.studies[i]])


class Loader:
    def __init__(self, job: dict):
        self.files, self.job = job["files"], job

    def run(self, epochs: int) -> int:
        """Reads everything `epochs` times; bytes of voxels (uint8) that passed."""
        voxels = 0
        data = Files(self.files * epochs)
        # Two workers, a batch of two studies: what the other side has.
        loader = DataLoader(data, batch_size=work.LOAD_BATCH, num_workers=work.CORES, persistent_workers=False)
        for batch in loader:
            voxels += batch.numel()
        return voxels


if __name__ == "__main__":
    torch.set_num_threads(work.CORES)
    serve(sys.argv[1], {"train": Trainer, "load": Loader})
