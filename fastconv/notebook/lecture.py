"""The source of the notebook that `fastconv notebook` writes; `convert.py` describes the format."""

# %% [markdown]
# # The lecture's classifier with fused modules
#
# The lecture builds a small ConvNeXt-like classifier of CIFAR-10's images and trains it for five epochs. This
# notebook goes through it again, on a small part of the data, and lets fastconv compute it: the same model and the
# same numbers, in less time.
#
# 1. The data
# 2. The model, as in the lecture
# 3. One line that makes it fast
# 4. Is it still the same model?
# 5. How much faster is it here?
# 6. Training
# 7. The homework: other widths and patches
# 8. A prediction, and why it depends on its neighbours
# 9. Where to go on
#
# All of it takes one to two minutes on two CPU cores. If CIFAR-10 is not there yet, its download of 170 MB comes
# on top, and at the very first use on a CPU some seconds in which the C++ kernels are compiled. The homework
# writes its files into the folder `fastconv-notebook` beside this notebook; nothing else is written.
#
# The next cell has all the sizes: make them larger if you have the time.

# %%
import copy
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torchinfo
from IPython.display import Image, display
from matplotlib import pyplot as plt
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import fastconv
from fastconv import machine
from fastconv.training import data

DATA = None  # The folder that holds CIFAR-10; None downloads it once.
IMAGES = 8_000  # Used here, of 50,000; a fifth of them is to validate on.
EPOCHS = 3
STEPS = 5  # Timed with and without fastconv.
WIDTHS = "16,32"  # The homework: each width with each patch,
PATCHES = "4,8"
SEEDS = 2  # so many times,
SWEEP_IMAGES = 1_500  # on so many images,
SWEEP_EPOCHS = 2  # for so many epochs.
FILES = Path("fastconv-notebook")

device = machine.choose_device("auto")
print(f"computing on {machine.gpu_name(device)}, PyTorch {torch.__version__}")

# %% [markdown]
# ## 1. The data
#
# CIFAR-10 has 50,000 images to train on and 10,000 to test on, of 32 x 32 pixels, in ten classes. Here are three
# of each class.

# %%
dataset = data.load(DATA and Path(DATA))
classes = dataset.classes

figure, axes = plt.subplots(3, 10, figsize=(10, 3.4), layout="constrained")
for label, column in enumerate(axes.T):
    column[0].set_title(classes[label], fontsize=9)
    examples = dataset.train.images[dataset.train.labels == label]
    for ax, image in zip(column, examples, strict=False):
        ax.imshow(image.permute(1, 2, 0))
        ax.axis("off")
plt.show()

# %% [markdown]
# The lecture scales the pixels to [0, 1] and does nothing else to them. It keeps 20 % of the training images to
# validate on, and shuffles the others into batches of 128. Here we first draw a small part of all images.

# %%
torch.manual_seed(55)
drawn = dataset.train.subset(torch.randperm(len(dataset.train))[:IMAGES])
training, validation = random_split(TensorDataset(drawn.images / 255, drawn.labels), [0.8, 0.2])
training_loader = DataLoader(training, batch_size=128, shuffle=True)
validation_loader = DataLoader(validation, batch_size=128)
print(f"{len(training):,} images to train on, {len(validation):,} to validate on")

# %% [markdown]
# ## 2. The model, as in the lecture
#
# A block has a depthwise convolution of 7 x 7 pixels that makes four maps of each, a layer norm, two pointwise (1
# x 1) convolutions with a GELU between them, and a residual connection.
#
# Look at the norm. `F.layer_norm(x, x.shape)` takes one mean and one variance of the *whole* tensor, with all
# images of the batch. We come back to that at the end.


# %%
class ConvNextBlock(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4 * in_channels, 7, padding="same", groups=in_channels)
        self.conv2 = nn.Conv2d(4 * in_channels, in_channels, 1)
        self.conv3 = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, inputs):
        x = self.conv1(inputs)
        x = F.layer_norm(x, x.shape)
        x = self.conv2(x)
        x = F.gelu(x)
        x = self.conv3(x)
        return x + inputs


class Classifier(nn.Module):
    def __init__(self, width=32, depth=5, patch=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, stride=patch)
        self.conv_block_1 = nn.Sequential(*[ConvNextBlock(width) for _ in range(depth)])
        self.downsample = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.conv_block_2 = nn.Sequential(*[ConvNextBlock(2 * width) for _ in range(depth)])
        self.bottleneck = nn.Conv2d(2 * width, 10, 1)

    def forward(self, inputs):
        x = self.stem(inputs)
        x = F.layer_norm(x, x.shape)
        x = self.conv_block_1(x)
        x = F.layer_norm(x, x.shape)
        x = self.downsample(x)
        x = self.conv_block_2(x)
        x = self.bottleneck(x)
        x = F.avg_pool2d(x, x.shape[-2:])
        return x.reshape(len(inputs), 10)


# %% [markdown]
# The stem cuts an image into 8 x 8 patches, each of which becomes a pixel of 32 channels. Five blocks follow, then
# a downsampling to 4 x 4 pixels of 64 channels, five more blocks, and a mean over the pixels: 235,434 parameters.

# %%
torch.manual_seed(0)
model = Classifier().to(device)
columns = ["output_size", "num_params", "mult_adds"]
torchinfo.summary(model, (128, 3, 32, 32), depth=2, col_names=columns, row_settings=["var_names"])

# %% [markdown]
# ## 3. One line that makes it fast
#
# `fastconv.swap` looks for blocks that it can compute, tries each on random numbers, with its gradients, and only
# if the results are the same gives it another forward. The parameters stay the model's own. We keep an untouched
# copy to compare with.

# %%
original = copy.deepcopy(model)
print(fastconv.swap(model))

# %% [markdown]
# ## 4. Is it still the same model?
#
# Both models compute in float32, which rounds. So we let a third copy compute the same in float64, and ask how far
# each of the two is from it: the norm of the difference, divided by the norm of the exact result. Errors of about
# 1e-7 to 1e-5 are rounding; a mistake would show as 1e-2 or more. (On a GPU PyTorch's own convolutions may round
# to TF32, which is coarser: there its errors are the larger ones.)


# %%
def logits_and_gradients(model, images, labels):
    logits = model(images)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
    return [logits, *gradients]


def errors(results, exact):
    """The relative error of each result."""
    results = [result.detach().cpu().double() for result in results]
    return [((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]


images, labels = next(iter(training_loader))
exact = logits_and_gradients(copy.deepcopy(original).cpu().double(), images.double(), labels)
for name, candidate in {"PyTorch": original, "fastconv": model}.items():
    results = logits_and_gradients(candidate, images.to(device), labels.to(device))
    of_logits, *of_gradients = errors(results, exact)
    print(f"{name:<9} error of the logits {of_logits:.1e}, ", end="")
    print(f"of {len(of_gradients)} gradients at most {max(of_gradients):.1e}")

# %% [markdown]
# ## 5. How much faster is it here?
#
# We time whole training steps: forward, loss, backward and AdamW. The two models take turns, so that whatever else
# the machine does slows both, and the median leaves out the steps that it slowed most.


# %%
def training_step(model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images.to(device)), labels.to(device))
    loss.backward()
    optimizer.step()
    return loss.item()


# Copies, because the steps change the weights.
contenders = {"PyTorch": copy.deepcopy(original), "fastconv": copy.deepcopy(model)}
optimizers = {name: torch.optim.AdamW(each.parameters()) for name, each in contenders.items()}
seconds = {name: [] for name in contenders}
for _ in range(1 + STEPS):
    for name, contender in contenders.items():
        start = time.perf_counter()
        training_step(contender, optimizers[name], images, labels)
        seconds[name].append(time.perf_counter() - start)

# The first step of each warms up.
medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
for name, median in medians.items():
    print(f"{name:<9} {1000 * median:7.1f} ms per step of {len(images)} images")
print(f"fastconv is {medians['PyTorch'] / medians['fastconv']:.1f} times as fast")

# %% [markdown]
# On a GPU a step this small is over before Python has asked for the next: most of the time goes into launching the
# kernels one by one. There `fastconv train`, which replays each step as a CUDA graph, shows what the kernels can
# do.
#
# ## 6. Training
#
# This is the lecture's loop: AdamW with a learning rate of 1e-3, and after each epoch loss and accuracy on the
# training and on the validation images. It need not know that the model was swapped.


# %%
@torch.no_grad()
def evaluate(model, loader):
    """The mean loss, and the accuracy in percent."""
    model.eval()
    loss, correct = 0.0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    count = len(loader.dataset)
    return loss / count, 100 * correct / count


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
history = {"training": [], "validation": []}
start = time.perf_counter()
for epoch in range(1, EPOCHS + 1):
    model.train()
    for images, labels in training_loader:
        training_step(model, optimizer, images, labels)
    for name, loader in {"training": training_loader, "validation": validation_loader}.items():
        loss, accuracy = evaluate(model, loader)
        history[name].append((loss, accuracy))
        print(f"epoch {epoch}, {name + ':':<11} loss {loss:.3f}, accuracy {accuracy:.1f} %")
print(f"{time.perf_counter() - start:.1f} s")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
epochs = range(1, EPOCHS + 1)
for name, points in history.items():
    for ax, values in zip(axes, zip(*points, strict=True), strict=True):
        ax.plot(epochs, values, marker="o", label=name)
for ax, quantity in zip(axes, ["loss", "accuracy, %"], strict=True):
    ax.set(xlabel="epoch", ylabel=quantity, xticks=epochs)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
plt.show()

# %% [markdown]
# With all images and five epochs the lecture reaches 59.73 % on its validation images, and so does fastconv,
# within what another seed changes.
#
# ## 7. The homework: other widths and patches
#
# The lecture asks what other blocks between the downsamplings, filters per layer and patches change. `fastconv
# sweep` trains each combination of the values that you list, with several seeds: a difference counts only if it is
# larger than what the seed alone changes. Here it trains four models with two seeds each, in batches of 32, so
# that few images make many steps.

# %%
# Without progress bars, which terminals redraw, but notebooks print again and again.
os.environ["TERM"] = "dumb"
program = f'"{sys.executable}" -m fastconv'
models = f"--width {WIDTHS} --patch {PATCHES} --seeds {SEEDS}"
size = f"--limit {SWEEP_IMAGES} --epochs {SWEEP_EPOCHS} --batch-size 32"
cifar10 = f'--data "{DATA}"' if DATA else ""
sweep = FILES / time.strftime("sweep-%Y%m%d-%H%M%S")
# !{program} sweep {models} {size} {cifar10} --out "{sweep}"

# %%
display(Image(sweep / "sweep.png"))

# %% [markdown]
# Smaller patches make larger maps: more work for nearly the same parameters, and a finer view of the image. But
# after two epochs on so few images the seeds differ about as much as the models do. For an answer the homework
# needs all images; its command is at the end of this notebook. The table is in the sweep's folder too, as
# `sweep.md` and `sweep.csv`, and each run has a folder of its own with its checkpoint.
#
# ## 8. A prediction, and why it depends on its neighbours
#
# Here is an image that the model has not seen. Its logits become probabilities by a softmax.


# %%
@torch.no_grad()
def probabilities(images):
    """The probabilities of the ten classes for the first image of a batch of bytes."""
    model.eval()
    return model(images.to(device) / 255).softmax(1)[0].cpu()


test = dataset.test.images
image = test[:1]
answer = probabilities(image)

figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", width_ratios=[1, 2])
axes[0].imshow(image[0].permute(1, 2, 0))
axes[0].set_title(classes[dataset.test.labels[0]])
axes[0].axis("off")
axes[1].barh(classes, 100 * answer)
axes[1].invert_yaxis()
axes[1].set_xlabel("probability, %")
plt.show()

# %% [markdown]
# The norm takes one mean and one variance of the whole batch. So the answer depends on the images that are in the
# batch beside this one, also when the model is not trained any more. Here is the same image alone, and in two
# batches of 128.

# %%
brightness = test.float().mean((1, 2, 3))
batches = {
    "alone": image,
    "beside other test images": test[:128],
    "beside the darkest images": torch.cat([image, test[brightness.argsort()[:127]]]),
}
for name, batch in batches.items():
    best, labels = probabilities(batch).topk(3)
    found = ", ".join(f"{classes[i]} {100 * p:.1f} %" for i, p in zip(labels, best, strict=True))
    print(f"{name + ':':<27} {found}")

# %% [markdown]
# A program that is asked about one image should not give an answer that other images decide. With `norm="sample"`
# each image has a mean and a variance of its own: `fastconv train --norm sample`.
#
# ## 9. Where to go on
#
# In a terminal:
#
# ```bash
# fastconv train                              # the lecture's whole training, in a few minutes on two cores
# fastconv train --recipe modern --epochs 30  # overfits less: crops, flips, smoothed labels
# fastconv sweep --width 32,64 --depth 3,5 --patch 2,4 --seeds 3    # the homework
# fastconv compare runs/*                     # a table and curves of whatever you have trained
# fastconv predict --checkpoint runs/.../checkpoint.pt cat.jpg
# fastconv check                              # every operation, compared with float64
# fastconv bench                              # every operation, timed beside PyTorch and torch.compile
# ```
#
# The modern recipe is made for all images. `fastconv.swap` also takes the ConvNeXts of torchvision, timm and
# Hugging Face; its report says what it swapped.
