"""Kernels of dense CRFs as the code of the field has them; each was compared with its source file.

All run 10 updates; ConvCRF runs 5. A name with ``_cam`` turns class maps into labels to train on,
one with ``_seg``, and those of ToCo, AFA and WeCLIP, refine the output of a segmentation network.
"""

from camkit.ops.crf_kernels import Kernels

PRESETS: dict[str, Kernels] = {
    "clip_es": Kernels(1, 3, 67, 3, 4),  # CLIP-ES eval_cam_with_crf.py, as deeplab-pytorch
    "psa": Kernels(3, 3, 80, 13, 10),  # PSA tool/imutils.py, also SEAM; too strong for weak CAMs
    "irn": Kernels(3, 3, 50, 5, 10),  # IRN misc/imutils.py, on labels of confidence 0.7
    "afa": Kernels(3, 3, 64, 5, 4),  # AFA scripts/test_msc_flip.py
    "afa_cam": Kernels(3, 3, 50, 5, 10),  # AFA utils/dcrf.py, crf_inference_label, as IRN
    "toco": Kernels(1, 1, 121, 5, 4),  # ToCo tools/infer_seg_voc.py
    "toco_cam": Kernels(3, 3, 36, 3, 4),  # ToCo tools/infer_cam_crf_label.py
    "weclip": Kernels(3, 3, 64, 5, 4),  # WeCLIP test_msc_flip_voc.py
    "mctformer": Kernels(3, 3, 80, 13, 10),  # MCTformer's copy of PSA
    "mctformer_seg": Kernels(4, 3, 83, 5, 3),  # MCTformer seg/tool/imutils.py
    "convcrf": Kernels(3, 3, 80, 13, 10),  # ConvCRF convcrf/convcrf.py, whose filter is another one
}
