"""NYU Depth V2 from RGB and depth with QMF: data, two networks, training and evaluation in one file to read and copy.

    python examples/nyud2.py DATA --epochs 3 --image-encoder tf_efficientnet_lite0 --weights FILE

DATA holds {train,test}/<class>/*.png, each PNG an RGB image in its left half and encoded depth in its right half:
`qmf-fusion prepare nyud2` makes it of the official release, `qmf-fusion sample nyud2 DATA` makes up a tiny one.
FILE holds the encoder's weights; `imagenet` downloads them, and without `--weights` they are random.

The fusion is the paper's: weights of -0.1 times each modality's energy (Eq. 9 and 13), trained with the objective of
Eq. 18. `--robust` takes the rule that the package recommends; it is the one line `fusion = ...` that differs.
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion

NAMES = ("rgb", "depth")


class Pairs(Dataset):
    """One split. The loss needs each sample's place in the training set, so a sample ends with its index."""

    def __init__(self, root: Path, split: str, classes: list[str], size: int, config: dict) -> None:
        self.classes = classes
        self.files = sorted((root / split).glob("*/*.png"))
        crop = [v2.RandomCrop(size), v2.RandomHorizontalFlip()] if split == "train" else [v2.CenterCrop(size)]
        to_tensors = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
        # v2's transforms of two images at once treat both alike: the same crop, the same flip.
        self.transform = v2.Compose([v2.Resize((size * 8 // 7, size * 8 // 7)), *crop, *to_tensors])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], int, int]:
        image = Image.open(self.files[index]).convert("RGB")
        half, height = image.width // 2, image.height
        rgb, depth = self.transform(image.crop((0, 0, half, height)), image.crop((half, 0, 2 * half, height)))
        return {"rgb": rgb, "depth": depth}, self.classes.index(self.files[index].parent.name), index


def make_head(name: str, weights: str | None, num_classes: int) -> nn.Module:
    """Any module that ends in class logits will do: here one of timm's image models."""
    file = {"file": weights} if weights not in (None, "imagenet") else None
    return timm.create_model(name, weights is not None, pretrained_cfg_overlay=file, num_classes=num_classes)


def to(device: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to(device) for name, x in inputs.items()}


@torch.no_grad()
def evaluate(
    model: FusionModel, loader: DataLoader, device: str, noisy: str | None = None
) -> tuple[float, list[float]]:
    """Accuracy, and each modality's mean weight; ``noisy`` names a modality to drown in noise."""
    model.eval()
    correct, weights = 0, []
    for inputs, target, _ in loader:
        inputs = to(device, inputs)
        if noisy is not None:
            inputs[noisy] = inputs[noisy] + 2 * torch.randn_like(inputs[noisy])
        out = model(inputs)
        correct += (out.logits.argmax(-1).cpu() == target).sum().item()
        weights.append(out.weights.cpu())
    return correct / len(loader.dataset), torch.cat(weights, 1).mean(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="pixels that are cut out of each image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image-encoder", default="resnet18", help="any of timm's image models")
    parser.add_argument("--weights", help="of the image encoder: a file, or imagenet to download; random without")
    parser.add_argument("--robust", action="store_true", help="the recommended rule in place of the paper's")
    args = parser.parse_args()
    torch.manual_seed(0)

    classes = sorted(folder.name for folder in (args.data / "train").iterdir() if folder.is_dir())
    heads = {name: make_head(args.image_encoder, args.weights, len(classes)) for name in NAMES}
    config = timm.data.resolve_model_data_config(heads["rgb"])  # the mean and deviation that the encoder knows
    train, test = (Pairs(args.data, split, classes, args.size, config) for split in ("train", "test"))
    one_left = len(train) % args.batch_size == 1  # which batch normalisation does not take
    train_loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=one_left)
    test_loader = DataLoader(test, args.batch_size)

    fusion = QualityAwareFusion.robust(NAMES, num_classes=len(classes)) if args.robust else QualityAwareFusion(NAMES)
    model = FusionModel(heads, fusion).to(args.device)
    criterion = QMFLoss(model.fusion, num_samples=len(train), ranking_weight=0.1).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5)

    for epoch in range(1, args.epochs + 1):
        model.train()
        for inputs, target, index in train_loader:
            out = model(to(args.device, inputs))
            loss = criterion(out, target.to(args.device), index.to(args.device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.3f}")

    for noisy in (None, *NAMES):
        accuracy, weights = evaluate(model, test_loader, args.device, noisy)
        shown = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(NAMES, weights, strict=True))
        print(f"test, {f'{noisy} noisy' if noisy else 'clean'}: accuracy {100 * accuracy:.1f} %, mean weights {shown}")


if __name__ == "__main__":
    main()
