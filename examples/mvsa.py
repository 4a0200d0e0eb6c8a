"""MVSA's sentiments from text and image with QMF, and whether the fusion helps: a BERT beside a ResNet.

    python examples/mvsa.py DATA --epochs 10 --device cuda --bert bert-base-uncased --imagenet

DATA holds {train,dev,test}.jsonl, each line with id, label, text and img, a path relative to DATA:
`qmf-fusion prepare mvsa` makes them of the official release, `qmf-fusion sample mvsa DATA` makes up a tiny set.
Without --bert the text's network is a tiny BERT with random weights, which learns little and needs no download.

The fusion is the paper's, with gradients stopped at the weights as in the released text-image code; `--robust` takes
the rule that the package recommends. At the end a report says whether Theorem 2's condition holds on the dev split:
are modalities weighed less where they err?
"""

import argparse
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

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, fusion_report

NAMES = ("text", "image")
MEAN, STD = (0.46777044, 0.44531429, 0.40661017), (0.12221994, 0.12145835, 0.14380469)
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


class Posts(Dataset):
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


@torch.no_grad()
def predict(model: FusionModel, loader: DataLoader, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Each modality's logits, the fused ones, and the labels."""
    model.eval()
    found = [(model(to(device, inputs)), labels) for inputs, labels, _ in loader]
    unimodal = [torch.cat(parts).cpu() for parts in zip(*(out.unimodal_logits for out, _ in found), strict=True)]
    return unimodal, torch.cat([out.logits for out, _ in found]).cpu(), torch.cat([labels for _, labels in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
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

    train, dev, test = (Posts(args.data, split, args.size) for split in ("train", "dev", "test"))
    train_loader = DataLoader(train, args.batch_size, shuffle=True, collate_fn=collate)
    dev_loader, test_loader = (DataLoader(part, args.batch_size, collate_fn=collate) for part in (dev, test))
    num_classes = len(train.classes)

    if args.robust:
        fusion = QualityAwareFusion.robust(NAMES, num_classes=num_classes)
    else:
        fusion = QualityAwareFusion(NAMES, detach_weights=True)
    model = FusionModel(make_heads(num_classes, args.bert, args.imagenet), fusion).to(args.device)
    criterion = QMFLoss(model.fusion, num_samples=len(train), ranking_weight=0.1).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    for epoch in range(1, args.epochs + 1):
        model.train()
        for inputs, target, index in train_loader:
            out = model(to(args.device, inputs))
            loss = criterion(out.unimodal_logits, target.to(args.device), index.to(args.device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.3f}")

    unimodal, fused, target = predict(model, test_loader, args.device)
    rows = {**dict(zip(NAMES, unimodal, strict=True)), "mean of logits": torch.stack(unimodal).mean(0), "fused": fused}
    for name, logits in rows.items():
        print(f"test, {name}: accuracy {100 * (logits.argmax(-1) == target).double().mean():.1f} %")
    unimodal, _, target = predict(model, dev_loader, args.device)
    print("on dev:", fusion_report(model.fusion.cpu(), unimodal, target).sentence)


if __name__ == "__main__":
    main()
