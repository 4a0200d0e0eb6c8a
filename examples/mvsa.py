"""MVSA's sentiments from text and image with QMF, and whether the fusion helps: a BERT beside an image network.

    python examples/mvsa.py DATA --epochs 3 --text-encoder FOLDER --image-encoder tf_efficientnet_lite0 --weights FILE

DATA holds {train,dev,test}.jsonl, each line with id, label, text and img, a path relative to DATA:
`qmf-fusion prepare mvsa` makes them of the official release, `qmf-fusion sample mvsa DATA` makes up a tiny set.
FOLDER is a pretrained text model that Transformers saved, or its name; FILE holds the image encoder's weights, and
`imagenet` downloads them. Without these options both networks are random, the text's tiny: they learn little.

The fusion is the paper's, with gradients stopped at the weights as in the released text-image code; `--robust` takes
the rule that the package recommends. At the end a report says whether Theorem 2's condition holds on the dev split:
are modalities weighed less where they err?
"""

import argparse
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

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, fusion_report

NAMES = ("text", "image")
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


class Posts(Dataset):
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
    parser.add_argument("--batch-size", type=int, default=16)
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
    parts = [Posts(args.data, split, classes, args.size, config) for split in ("train", "dev", "test")]
    dev_loader, test_loader = (DataLoader(part, args.batch_size, collate_fn=collate) for part in parts[1:])
    # Batch normalisation takes no batch of one.
    one_left = len(parts[0]) % args.batch_size == 1
    train_loader = DataLoader(parts[0], args.batch_size, shuffle=True, collate_fn=collate, drop_last=one_left)

    if args.robust:
        fusion = QualityAwareFusion.robust(NAMES, num_classes=len(classes))
    else:
        fusion = QualityAwareFusion(NAMES, detach_weights=True)
    model = FusionModel({"text": text, "image": image}, fusion).to(args.device)
    criterion = QMFLoss(model.fusion, num_samples=len(parts[0]), ranking_weight=0.1).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    for epoch in range(1, args.epochs + 1):
        model.train()
        for inputs, target, index in train_loader:
            out = model(to(args.device, inputs))
            loss = criterion(out, target.to(args.device), index.to(args.device)).loss
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
