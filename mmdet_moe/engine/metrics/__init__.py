from mmdet_moe.engine.metrics.dispatch_entropy import DispatchEntropy

__all__ = ['DispatchEntropy']
