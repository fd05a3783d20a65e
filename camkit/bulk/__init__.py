"""Folders of any size: many processes, resumable results, and failures that stop nothing else."""

from camkit.bulk.by_folder import LabelledByFolder as LabelledByFolder
from camkit.bulk.camfiles import (
    CamFolder as CamFolder,
    FileItem as FileItem,
    read_list as read_list,
)
from camkit.bulk.camjobs import (
    DrawMask as DrawMask,
    FilesSummary as FilesSummary,
    RefineCam as RefineCam,
    write_all as write_all,
)
from camkit.bulk.items import Failure as Failure, Item as Item
from camkit.bulk.parquet_rows import ParquetRows as ParquetRows
from camkit.bulk.ray_engine import RayEngine as RayEngine
from camkit.bulk.recipe import Loading as Loading, Recipe as Recipe, Writing as Writing
from camkit.bulk.running import (
    FitSummary as FitSummary,
    Rank as Rank,
    RunSummary as RunSummary,
    fit_readout as fit_readout,
    run as run,
)
from camkit.bulk.scoring import (
    ScoreResult as ScoreResult,
    pair_truth as pair_truth,
    score_cams as score_cams,
    score_masks as score_masks,
)
from camkit.bulk.sources import (
    DataSetPhotos as DataSetPhotos,
    Labelled as Labelled,
    PhotoFolder as PhotoFolder,
    PhotoList as PhotoList,
    open_source as open_source,
)
from camkit.bulk.tars import TarShards as TarShards
from camkit.bulk.workers import run_jobs as run_jobs
