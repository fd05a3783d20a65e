"""Whole folders of files at once: many processes, a progress bar, and what fails stays alone."""

from camkit.bulk.camfolder import CamFolder as CamFolder, read_list as read_list
from camkit.bulk.camjobs import (
    DrawMask as DrawMask,
    RefineCam as RefineCam,
    Written as Written,
    write_all as write_all,
)
from camkit.bulk.counting import (
    CountCam as CountCam,
    Counted as Counted,
    CountMask as CountMask,
    TruthItem as TruthItem,
    count as count,
    pair_truth as pair_truth,
)
from camkit.bulk.items import Item as Item, Refused as Refused
from camkit.bulk.jobs import Done as Done, Failure as Failure, run_jobs as run_jobs
from camkit.bulk.labels import ImageLabels as ImageLabels, read_labels as read_labels
from camkit.bulk.opening import Opening as Opening
from camkit.bulk.plan import Share as Share
from camkit.bulk.ray_engine import RayEngine as RayEngine
from camkit.bulk.recipe import (
    Reading as Reading,
    Recipe as Recipe,
    Writing as Writing,
)
from camkit.bulk.running import Ran as Ran, run as run
from camkit.bulk.scoring import (
    Scored as Scored,
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
