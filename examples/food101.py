"""FOOD101's dishes from text and image with QMF, with the released schedule: freezing, accumulation, an epoch by dev.

    python examples/food101.py DATA --epochs 30 --device cuda --bert bert-base-uncased --imagenet

DATA holds {train,dev,test}.jsonl, each line with id, label, text and img, a path relative to DATA; docs/data.md says
where to get it, and `qmf-fusion sample food101 DATA` makes up a tiny set. Without --bert the text's network is a tiny
BERT with random weights, which learns little and needs no download.

A pretrained encoder would be spoilt by the first steps of fresh classifiers: the image's waits for 3 epochs and the
text's for 5, while the classifiers behind them learn. Batches of 16 are added up to steps of 640, and the epoch that
is best on dev is the one that is tested. `--robust` takes the rule that the package recommends.
"""

import argparse
import copy
import json
import zlib
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms import v2
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion

NAMES = ("text", "image")
MEAN, STD = (0.46777044, 0.44531429, 0.40661017), (0.12221994, 0.12145835, 0.14380469)
FROZEN_EPOCHS = {"text": 5, "image": 3}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


class Recipes(Dataset):
    """One split: text and image, the label, and the sample's place in the split, which the loss needs."""

    def __init__(self, root: Path, split: str, size: int) -> None:
        self.root = root
        self.rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        self.classes = sorted({json.loads(line)["label"] for line in (root / "train.jsonl").read_text().splitlines()})
        to_tensors = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.transform = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *to_tensors])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, Tensor, int, int]:
        row = self.rows[index]
        image = self.transform(Image.open(self.root / row["img"]).convert("RGB"))
        return row["text"], image, self.classes.index(row["label"]), index


def tiny_tokenizer(texts: list[str], **_: object) -> dict[str, Tensor]:
    """Words as numbers from 1 to 999 by their checksum, padded with 0."""
    rows = [
        torch.tensor([1 + zlib.crc32(word.encode()) % 999 for word in text.split()[:64] or ["_"]]) for text in texts
    ]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def make_heads(num_classes: int, bert: str | None, imagenet: bool) -> dict[str, nn.Module]:
    """FusionModel takes modules that return logits, or an object with .logits, as Transformers' models do."""
    if bert is None:
        text = BertForSequenceClassification(BertConfig(vocab_size=1000, num_labels=num_classes, **TINY))
    else:
        text = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=num_classes)
    image = resnet18(weights=ResNet18_Weights.IMAGENET1K_V1 if imagenet else None)
    image.fc = nn.Linear(image.fc.in_features, num_classes)
    return {"text": text, "image": image}


def to(device: str, inputs: dict) -> dict:
    """Tensors, and mappings of them, on the device."""
    return {name: to(device, x) if isinstance(x, dict) else x.to(device) for name, x in inputs.items()}


def freeze(head: nn.Module, frozen: bool) -> None:
    """Fix all of a head but its last layer, or let it learn."""
    head.requires_grad_(not frozen)
    (head.classifier if hasattr(head, "classifier") else head.fc).requires_grad_(True)


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
    parser.add_argument("--bert", help="a pretrained BERT's name or folder")
    parser.add_argument("--imagenet", action="store_true", help="start from ImageNet's weights (downloaded)")
    parser.add_argument("--robust", action="store_true", help="the recommended rule in place of the paper's")
    args = parser.parse_args()
    torch.manual_seed(0)

    tokenize = tiny_tokenizer if args.bert is None else AutoTokenizer.from_pretrained(args.bert)

    def collate(samples: list) -> tuple[dict, Tensor, Tensor]:
        images, labels, index = default_collate([sample[1:] for sample in samples])
        tokens = tokenize([sample[0] for sample in samples], padding=True, truncation=True, return_tensors="pt")
        return {"text": dict(tokens), "image": images}, labels, index

    train, dev, test = (Recipes(args.data, split, args.size) for split in ("train", "dev", "test"))
    train_loader = DataLoader(train, 16, shuffle=True, collate_fn=collate)
    dev_loader, test_loader = (DataLoader(part, 16, collate_fn=collate) for part in (dev, test))
    num_classes = len(train.classes)

    if args.robust:
        fusion = QualityAwareFusion.robust(NAMES, num_classes=num_classes)
    else:
        fusion = QualityAwareFusion(NAMES, detach_weights=True)
    model = FusionModel(make_heads(num_classes, args.bert, args.imagenet), fusion).to(args.device)
    criterion = QMFLoss(model.fusion, num_samples=len(train), ranking_weight=0.1).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    best, best_state = -1.0, None
    for epoch in range(args.epochs):
        for name, head in model.heads.items():
            freeze(head, epoch < FROZEN_EPOCHS[name])
        model.train()
        for number, (inputs, target, index) in enumerate(train_loader, start=1):
            out = model(to(args.device, inputs))
            loss = criterion(out.unimodal_logits, target.to(args.device), index.to(args.device)).loss
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
