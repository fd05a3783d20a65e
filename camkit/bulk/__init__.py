"""Whole folders of files at once: many processes, a progress bar, and what fails stays alone."""

from camkit.bulk.camfiles import (
    CamFolder as CamFolder,
    DrawMask as DrawMask,
    FileResult as FileResult,
    ImageLabels as ImageLabels,
    RefineCam as RefineCam,
    read_labels as read_labels,
    read_list as read_list,
    write_all as write_all,
)
from camkit.bulk.items import Item as Item, Refused as Refused
from camkit.bulk.ledger import Share as Share
from camkit.bulk.opening import Opening as Opening
from camkit.bulk.ray_engine import RayEngine as RayEngine
from camkit.bulk.recipe import (
    Reading as Reading,
    Recipe as Recipe,
    Writing as Writing,
)
from camkit.bulk.running import RunSummary as RunSummary, run as run
from camkit.bulk.scoring import (
    CountCam as CountCam,
    CountMask as CountMask,
    CountResult as CountResult,
    ScoreResult as ScoreResult,
    TruthItem as TruthItem,
    count as count,
    pair_truth as pair_truth,
    score_cams as score_cams,
    score_masks as score_masks,
)
from camkit.bulk.shards import ParquetRows as ParquetRows, TarShards as TarShards
from camkit.bulk.sources import (
    DataSetPhotos as DataSetPhotos,
    Labelled as Labelled,
    PhotoFolder as PhotoFolder,
    PhotoList as PhotoList,
)
from camkit.bulk.workers import Done as Done, Failure as Failure, run_jobs as run_jobs
