"""FOOD101's dishes from text and image with QMF, with the released schedule: freezing, accumulation, an epoch by dev.

    python examples/food101.py DATA --text-encoder FOLDER --image-encoder tf_efficientnet_lite0 --weights FILE

DATA holds {train,dev,test}.jsonl, each line with id, label, text and img, a path relative to DATA: docs/data.md says
where to get it, `qmf-fusion sample food101 DATA` makes up a tiny set. FOLDER is a pretrained text model that
Transformers saved, or its name; FILE holds the image encoder's weights, and `imagenet` downloads them. Without these
options both networks are random, the text's tiny: they learn little.

Fresh classifiers' first steps would spoil a pretrained encoder: the image's waits for 3 epochs and the text's for 5.
Batches of 16 are added up to steps of 640, and the epoch that is best on dev is the one that is tested. `--robust`
takes the rule that the package recommends.
"""

import argparse
import copy
import json
import zlib
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion

NAMES = ("text", "image")
FROZEN_EPOCHS = {"text": 5, "image": 3}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


class Recipes(Dataset):
    """One split: text and image, the label, and the sample's place in the split, which the loss needs."""

    def __init__(self, root: Path, split: str, classes: list[str], size: int, config: dict) -> None:
        self.root, self.classes = root, classes
        self.rows = read_rows(root / f"{split}.jsonl")
        to_tensors = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
        self.transform = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *to_tensors])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, Tensor, int, int]:
        row = self.rows[index]
        image = self.transform(Image.open(self.root / row["img"]).convert("RGB"))
        return row["text"], image, self.classes.index(row["label"]), index


def tiny_tokenizer(texts: list[str], **_: object) -> dict[str, Tensor]:
    """Words as numbers from 1 to 999 by their checksum, padded with 0."""
    rows = [[1 + zlib.crc32(word.encode()) % 999 for word in text.split()[:64] or ["_"]] for text in texts]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def make_image_head(name: str, weights: str | None, num_classes: int) -> nn.Module:
    """FusionModel takes any module that returns logits: here one of timm's image models."""
    file = {"file": weights} if weights not in (None, "imagenet") else None
    return timm.create_model(name, weights is not None, pretrained_cfg_overlay=file, num_classes=num_classes)


def make_text_head(name: str | None, num_classes: int) -> nn.Module:
    """Or an object with .logits, as Transformers' models do."""
    if name is None:
        return BertForSequenceClassification(BertConfig(vocab_size=1000, num_labels=num_classes, **TINY))
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=num_classes)


def to(device: str, inputs: dict) -> dict:
    """Tensors, and mappings of them, on the device."""
    return {name: to(device, x) if isinstance(x, dict) else x.to(device) for name, x in inputs.items()}


def freeze(head: nn.Module, frozen: bool) -> None:
    """Fix all of a head but its last layer, or let it learn."""
    head.requires_grad_(not frozen)
    (head.get_classifier() if hasattr(head, "get_classifier") else head.classifier).requires_grad_(True)


@torch.no_grad()
def evaluate(model: FusionModel, loader: DataLoader, device: str) -> float:
    model.eval()
    correct = 0
    for inputs, target, _ in loader:
        correct += (model(to(device, inputs)).logits.argmax(-1).cpu() == target).sum().item()
    return correct / len(loader.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--accumulate", type=int, default=40, help="batches of a step")
    parser.add_argument("--size", type=int, default=224, help="pixels that are cut out of each image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text-encoder", help="a pretrained text model's name or folder; a tiny random one without")
    parser.add_argument("--image-encoder", default="resnet18", help="any of timm's image models")
    parser.add_argument("--weights", help="of the image encoder: a file, or imagenet to download; random without")
    parser.add_argument("--robust", action="store_true", help="the recommended rule in place of the paper's")
    args = parser.parse_args()
    torch.manual_seed(0)

    tokenize = AutoTokenizer.from_pretrained(args.text_encoder) if args.text_encoder else tiny_tokenizer

    def collate(samples: list) -> tuple[dict, Tensor, Tensor]:
        images, labels, index = default_collate([sample[1:] for sample in samples])
        tokens = tokenize([sample[0] for sample in samples], padding=True, truncation=True, return_tensors="pt")
        return {"text": dict(tokens), "image": images}, labels, index

    classes = sorted({row["label"] for row in read_rows(args.data / "train.jsonl")})
    text = make_text_head(args.text_encoder, len(classes))
    image = make_image_head(args.image_encoder, args.weights, len(classes))
    config = timm.data.resolve_model_data_config(image)  # the mean and deviation that the encoder knows
    parts = [Recipes(args.data, split, classes, args.size, config) for split in ("train", "dev", "test")]
    dev_loader, test_loader = (DataLoader(part, 16, collate_fn=collate) for part in parts[1:])
    # Batch normalisation takes no batch of one.
    one_left = len(parts[0]) % 16 == 1
    train_loader = DataLoader(parts[0], 16, shuffle=True, collate_fn=collate, drop_last=one_left)

    if args.robust:
        fusion = QualityAwareFusion.robust(NAMES, num_classes=len(classes))
    else:
        fusion = QualityAwareFusion(NAMES, detach_weights=True)
    model = FusionModel({"text": text, "image": image}, fusion).to(args.device)
    criterion = QMFLoss(model.fusion, num_samples=len(parts[0]), ranking_weight=0.1).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    best, best_state = -1.0, None
    for epoch in range(args.epochs):
        for name, head in model.heads.items():
            freeze(head, epoch < FROZEN_EPOCHS[name])
        model.train()
        for number, (inputs, target, index) in enumerate(train_loader, start=1):
            out = model(to(args.device, inputs))
            loss = criterion(out, target.to(args.device), index.to(args.device)).loss
            (loss / args.accumulate).backward()
            if number % args.accumulate == 0 or number == len(train_loader):
                optimizer.step()
                optimizer.zero_grad()
        accuracy = evaluate(model, dev_loader, args.device)
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}, dev accuracy {100 * accuracy:.1f} %")
        if accuracy > best:
            best, best_state = accuracy, copy.deepcopy(model.state_dict())

    model.load_state_dict(best_state)
    print(f"test: accuracy {100 * evaluate(model, test_loader, args.device):.1f} %")


if __name__ == "__main__":
    main()
