"""The four data sets of the paper: their names, classes, layouts, and where each is obtained."""

from dataclasses import dataclass

from .faults import DataError
from .food101_classes import FOOD101_CLASSES

NYUD2_COMMON = (
    "bathroom",
    "bedroom",
    "bookstore",
    "classroom",
    "dining_room",
    "home_office",
    "kitchen",
    "living_room",
    "office",
)
"""The nine most common of NYU Depth V2's 27 scene types; the others make up the tenth class.

Gupta, Arbelaez, Girshick and Malik, *Indoor Scene Understanding with RGB-D Images* (IJCV 2015), section on scene
classification.
"""
SUNRGBD_SCENES = (
    "bathroom",
    "bedroom",
    "classroom",
    "computer_room",
    "conference_room",
    "corridor",
    "dining_area",
    "dining_room",
    "discussion_area",
    "furniture_store",
    "home_office",
    "kitchen",
    "lab",
    "lecture_theatre",
    "library",
    "living_room",
    "office",
    "rest_space",
    "study_space",
)
"""The scenes of SUN RGB-D with more than 80 images: Song, Lichtenberg and Xiao (CVPR 2015), section 4.1."""

UNFINISHED_FILE = "prepared.json.unfinished"
"""Lies in a folder of pairs until ``prepare`` has gone through all frames: readers refuse a part of a set."""

_PAIRED_LAYOUT = "{train,test}/<class>/*.png, each PNG RGB in its left half and HHA depth in its right half"
_TEXT_LAYOUT = "{train,dev,test}.jsonl with id, label, text and img, a path relative to the folder"


@dataclass(frozen=True)
class DataSet:
    """One data set: ``classes`` as ``prepare`` and ``sample`` write them, ``splits`` that training needs."""

    name: str
    title: str
    modalities: tuple[str, str]
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    layout: str
    obtain: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def paired(self) -> bool:
        """Whether it is of image pairs, not of texts with images."""
        return self.modalities == ("rgb", "depth")


_RGBD = ((0.4951, 0.3601, 0.4587), (0.1474, 0.1950, 0.1646))
_WEB = ((0.46777044, 0.44531429, 0.40661017), (0.12221994, 0.12145835, 0.14380469))

DATA_SETS = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            "nyud2",
            "NYU Depth V2",
            ("rgb", "depth"),
            tuple(sorted((*NYUD2_COMMON, "others"))),
            ("train", "test"),
            _PAIRED_LAYOUT,
            "download nyu_depth_v2_labeled.mat and splits.mat from the NYU Depth Dataset V2 page "
            "(Silberman et al. 2012), then: "
            "qmf-fusion prepare nyud2 --mat nyu_depth_v2_labeled.mat --splits splits.mat --out DIR "
            "(of numbered images: --images, --depths and --meta in place of --mat and --splits)",
            *_RGBD,
        ),
        DataSet(
            "sunrgbd",
            "SUN RGB-D",
            ("rgb", "depth"),
            SUNRGBD_SCENES,
            ("train", "test"),
            _PAIRED_LAYOUT,
            "download SUNRGBD.zip and SUNRGBDtoolbox.zip from the SUN RGB-D page (Song et al. 2015), unpack both into "
            "one folder, then: qmf-fusion prepare sunrgbd --raw FOLDER --out DIR",
            *_RGBD,
        ),
        DataSet(
            "food101",
            "UPMC FOOD-101",
            ("text", "image"),
            FOOD101_CLASSES,
            ("train", "dev", "test"),
            _TEXT_LAYOUT,
            "download UPMC Food-101 (Wang et al. 2015) and put the train, dev and test .jsonl of the published splits "
            "(QMF's or MMBT's repository) beside its images folder",
            *_WEB,
        ),
        DataSet(
            "mvsa",
            "MVSA-Single",
            ("text", "image"),
            ("negative", "neutral", "positive"),
            ("train", "dev", "test"),
            _TEXT_LAYOUT,
            "download MVSA-Single (Niu et al. 2016), then put the published .jsonl splits beside its data folder, or "
            "make splits with: qmf-fusion prepare mvsa --raw MVSA_Single",
            *_WEB,
        ),
    )
}


def data_set(name: str) -> DataSet:
    """The data set of that name.

    Raises:
        DataError: there is none.
    """
    if name not in DATA_SETS:
        raise DataError(f"the data set must be one of {', '.join(DATA_SETS)}, got {name!r}")
    return DATA_SETS[name]


def how_to_obtain(known: DataSet) -> str:
    """What to do for someone who has not got the data."""
    without = f"To try without it: qmf-fusion sample {known.name} DIR"
    return f"{known.title} lies as {known.layout}. To get it: {known.obtain}. {without}"
