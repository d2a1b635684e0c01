"""Is the run learning? Numbers read off tensors that are there anyway."""

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def feature_health(features_BD: Tensor) -> dict[str, float]:
    """Signs of life in a batch of class tokens.

    features_BD  class tokens after the final norm
    returns      spread: standard deviation of each dimension of the unit vectors, times √D (1 = isotropic, 0 = collapse);
                 rank: effective rank exp(H(σ/Σσ)) of the centred features (RankMe, arXiv 2210.02885), at most B − 1;
                 norm: mean length of the features
    """
    x = features_BD.float()
    unit = functional.normalize(x, dim=-1)
    spread = unit.std(0).mean() * x.shape[1] ** 0.5
    sigma = torch.linalg.svdvals(x - x.mean(0))
    share = sigma / sigma.sum().clamp_min(1e-12)
    rank = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    return {"spread": float(spread), "rank": float(rank), "norm": float(x.norm(dim=-1).mean())}
