"""
Augmentations by name. A photograph is augmented on its own, in a data worker. Small images are augmented as a batch of
uint8 images in the device's memory, with random numbers that the epoch draws (Draws in data.py).

    sup      random crop and flip; the paper uses it for CE, KCL and FCL
    moco     MoCo v1's; the paper uses it for CL
    mocov2   MoCo v2's, for comparison
    lt       the usual one in long-tailed recognition, for comparison
    affine   small rotations, shifts and scales, for digits
    cifar    random crop of the padded image, and flip
    simclr   SimCLR's for CIFAR
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2 as T

# ---- augmentations of one image, in a data worker

class RandomResizedCrop(T.RandomResizedCrop):
    """torchvision's, pixel for pixel, in 0.85 of its time. It copies the crop before resizing, because the uint8 kernel
    is slow on a view of a larger image."""

    def forward(self, image):
        params = self.make_params([image])
        y, x, h, w = (params[name] for name in ("top", "left", "height", "width"))
        crop = image[None, :, y:y + h, x:x + w].contiguous(memory_format=torch.channels_last)
        return F.interpolate(crop, self.size, mode="bilinear", antialias=True)[0]


def adjust_hue(image, turns):
    """torchvision's adjust_hue for uint8 images (..., 3, H, W), to within one grey level and five times as fast.
    turns: a number, or one per image (..., 1, 1).

    Hues lie on a circle: red at 0, green at a third of a turn, blue at two thirds. A channel has the pixel's largest
    value if the pixel's hue is within a sixth of a turn of the channel's own hue, and the smallest value if it is more
    than two sixths away. In between the channel is linear.
    """
    rgb = image.short()
    r, g, b = rgb.unbind(-3)
    low, high = rgb.amin(-3), rgb.amax(-3)                                # (..., H, W)
    chroma = high - low

    # the distance from pure red grows as red goes down and green and blue go up; 6 * chroma is a full turn
    from_red = (high - r) + (g - low) + (b - low)
    hue = torch.copysign(from_red, g - b)  # positive towards green, negative towards blue
    hue = hue / (6 * chroma).clamp_(min=1) + turns  # grey has no hue, and its chroma of 0 cancels this one

    # in place, because allocating memory takes longer than the arithmetic
    away = torch.stack([hue, hue - 1 / 3, hue - 2 / 3], dim=-3)           # (..., 3, H, W)
    away.sub_(away.round()).abs_()  # the shorter way around the circle
    share = away.mul_(-6).add_(2).clamp_(0, 1)
    share.mul_(chroma.unsqueeze(-3)).add_(low.unsqueeze(-3))
    return share.mul_(255.999 / 255).byte()  # rounds as torchvision does


class ColorJitter(T.ColorJitter):
    """torchvision's with our adjust_hue, because hue takes most of its time. It draws the same random numbers."""

    def transform(self, image, params):
        for i in params["fn_idx"]:  # brightness 0, contrast 1, saturation 2 and hue 3, in random order
            if i == 3 and self.hue:
                image = adjust_hue(image, params["hue_factor"])
            else:
                image = super().transform(image, params | {"fn_idx": [i]})
        return image


def augmentation(name, pixels):
    """A random transform of one image: uint8 (3, H, W) -> uint8 (3, pixels, pixels)."""
    flip = T.RandomHorizontalFlip()
    planes = T.Lambda(torch.Tensor.contiguous)  # channels first makes the colour transforms a quarter faster
    if name == "sup":  # crops of 0.08 to 1 of the area, torchvision's default
        return nn.Sequential(RandomResizedCrop(pixels), flip)
    if name == "lt":
        return nn.Sequential(RandomResizedCrop(pixels), flip, planes, ColorJitter(0.4, 0.4, 0.4, 0))
    crop = RandomResizedCrop(pixels, (0.2, 1))
    if name == "moco":
        return nn.Sequential(crop, planes, T.RandomGrayscale(0.2), ColorJitter(0.4, 0.4, 0.4, 0.4), flip)
    if name == "mocov2":
        jitter = T.RandomApply([ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
        blur = T.RandomApply([T.GaussianBlur(pixels // 20 * 2 + 1, (0.1, 2.0))], 0.5)  # a tenth, as in SimCLR
        return nn.Sequential(crop, planes, jitter, T.RandomGrayscale(0.2), blur, flip)
    raise ValueError(f"no augmentation {name}")


# ---- augmentations of a batch of small images, in the device's memory

def affine(images, u):
    """For digits: rotation by up to 15 degrees, shift by up to a tenth, scale by 0.85 to 1.15. A flip or a small crop
    could change the class (2 and 5, 6 and 0). images: uint8 (B, 3, H, W). u: (B, 4), uniform in [0, 1)."""
    H, W = images.shape[-2:]
    angle, scale = (2 * u[:, 0] - 1) * math.radians(15), 0.85 + 0.3 * u[:, 3]
    dx, dy = (0.1 * W * (2 * u[:, 1] - 1)).round(), (0.1 * H * (2 * u[:, 2] - 1)).round()    # whole pixels

    # the source of each output pixel, in [-1, 1] coordinates: undo the shift, the rotation and the scale
    x = (2 * (torch.arange(W, device=u.device) - dx[:, None]) + 1) / W - 1                   # (B, W)
    y = (2 * (torch.arange(H, device=u.device) - dy[:, None]) + 1) / H - 1                   # (B, H)
    x, y = x[:, None], y[:, :, None]
    cos, sin = (angle.cos() / scale)[:, None, None], (angle.sin() / scale)[:, None, None]
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=3)                        # (B, H, W, 2)
    return F.grid_sample(images.float(), grid, align_corners=False).round_().to(torch.uint8)


def crop_flip(images, u, padding=4):
    """CIFAR's random crop of the padded image, and flip. images: uint8 (B, 3, H, W). u: (B, 3), uniform in [0, 1)."""
    B, _, H, W = images.shape
    padded = F.pad(images, (padding,) * 4)
    y, x = (u[:, :2, None] * (2 * padding + 1)).long().unbind(1)          # (B, 1) each
    rows, columns = y + torch.arange(H, device=u.device), x + torch.arange(W, device=u.device)
    columns = torch.where(u[:, 2:] < 0.5, columns, columns.flip(1))
    image = torch.arange(B, device=u.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def blend(images, others, ratio):
    """ratio * images + (1 - ratio) * others, both (B, 1 or 3, H, W) in 0..255, rounded down as torchvision does."""
    return (ratio * images + (1 - ratio) * others).clamp_(0, 255).floor_()


def gray(images):
    return (images * images.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).floor_()


def simclr(images, u):
    """SimCLR's for CIFAR: a random crop of 0.2 to 1 of the area, a flip, colour jitter (0.4, 0.4, 0.4, 0.1) with
    probability 0.8, and grey with probability 0.2. It follows torchvision's transforms, but always jitters in the order
    brightness, contrast, saturation, hue.

    images: uint8 (B, 3, H, W). u: (B, 29), uniform in [0, 1).
    """
    B, _, H, W = images.shape
    area, aspect, u = u[:, :10], u[:, 10:20], u[:, 20:, None, None, None]

    # take the first of ten random boxes that fits into the image, as RandomResizedCrop does; 1 view in 10^8 has none
    area, aspect = (0.2 + 0.8 * area) * H * W, ((2 * aspect - 1) * math.log(4 / 3)).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()                    # (B, 10)
    first = ((w <= W) & (h <= H)).int().argmax(1, keepdim=True)
    w, h = w.gather(1, first).clamp(max=W), h.gather(1, first).clamp(max=H)                  # (B, 1)
    x0, y0 = (u[:, 0, 0, 0] * (W - w + 1)).floor(), (u[:, 1, 0, 0] * (H - h + 1)).floor()

    # sample bilinearly inside the box: its pixel centers, clamped to the box, in grid_sample's [-1, 1] coordinates
    def coordinates(start, length, side):                                                    # (B, side)
        at = ((torch.arange(side, device=u.device) + 0.5) * length / side - 0.5).clamp(min=0)
        return (2 * (start + at.minimum(length - 1)) + 1) / side - 1

    x, y = coordinates(x0, w, W), coordinates(y0, h, H)
    x = torch.where(u[:, 2, 0, 0] < 0.5, x, x.flip(1))
    grid = torch.stack([x[:, None].expand(B, H, W), y[:, :, None].expand(B, H, W)], dim=3)
    view = F.grid_sample(images.float(), grid, align_corners=False).round_()                 # (B, 3, H, W)

    # jitter brightness, contrast, saturation and hue
    jittered = blend(view, view.new_zeros(()), 0.6 + 0.8 * u[:, 3])
    jittered = blend(jittered, gray(jittered).mean((2, 3), keepdim=True), 0.6 + 0.8 * u[:, 4])
    jittered = blend(jittered, gray(jittered), 0.6 + 0.8 * u[:, 5])
    jittered = adjust_hue(jittered.byte(), 0.2 * u[:, 6, 0] - 0.1).float()
    view = torch.where(u[:, 7] < 0.8, jittered, view)
    return torch.where(u[:, 8] < 0.2, gray(view), view).byte()


# name -> (function, random numbers per view)
BATCHED = {"affine": (affine, 4), "cifar": (crop_flip, 3), "simclr": (simclr, 29)}
AUGMENTATIONS = ("sup", "moco", "mocov2", "lt", *BATCHED)
