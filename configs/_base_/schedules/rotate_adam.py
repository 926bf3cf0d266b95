# Adam, whose steps do not depend on the length of the gradient: so an expert that gets few images
# moves as far as one that gets many, which is what the paper normalises its gradients for.
_base_ = './cifar_adam.py'
train_cfg = dict(max_epochs=30)
param_scheduler = dict(milestones=[17, 25])
