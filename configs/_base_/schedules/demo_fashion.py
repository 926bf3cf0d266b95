# As demo.py, from the model that was pretrained on fashion scenes. Another checkpoint:
# `export FASHION_PRETRAINED=FILE`, or `--cfg-options load_from=FILE`.
_base_ = './demo.py'
load_from = '{{$FASHION_PRETRAINED:work_dirs/retinanet_pretrain_fashion/iter_600.pth}}'
