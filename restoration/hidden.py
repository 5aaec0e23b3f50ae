"""Pictures with a straight alpha: what a wide filter or a network must not see of the colours under alpha 0.

A transparent pixel keeps whatever colour a tool left there. Filters carry it to where the picture is visible, so it is
replaced by the colour of the nearest visible pixel before anything looks further than one pixel.
"""

from __future__ import annotations

import torch
from scipy import ndimage
from torch import Tensor

GREY = 0.5


def filled(images: Tensor) -> Tensor:
    """Images (B, H, W, C): of four channels, those with alpha 0 in the colour of the nearest pixel with another alpha.

    Alpha stays as it is; a picture without a visible pixel becomes grey. Images of other channels, and those that hide
    nothing, are given back themselves.
    """
    if images.shape[-1] != 4 or not bool((images[..., 3] == 0).any()):
        return images
    rows = []
    for image in images:
        hidden = image[..., 3] == 0
        colours = image[..., :3]
        if bool(hidden.all()):
            colours = torch.full_like(colours, GREY)
        elif bool(hidden.any()):
            places = ndimage.distance_transform_edt(hidden.cpu().numpy(), return_distances=False, return_indices=True)
            y, x = torch.from_numpy(places).to(image.device, torch.long)
            colours = colours[y, x]
        rows.append(torch.cat([colours, image[..., 3:]], -1))
    return torch.stack(rows)
