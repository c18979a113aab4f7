//! Attention whose queries, keys and values are one projection.

use engraft_nn::{Attend, Linear, Pass, SiteId, Sites};
use engraft_tensor::Tensor;

/// O·attend(q, k, v) with (q, k, v) = C·x.
pub(crate) struct FusedAttention {
    /// C [3·width, width].
    pub qkv: Linear,
    pub attend: Attend,
    pub o: Linear,
    pub heads: usize,
}

impl FusedAttention {
    /// The key-and-value site.
    pub fn site(&self) -> SiteId {
        self.attend.site()
    }

    /// x [tokens, width] → [tokens, width].
    pub fn forward(&self, x: &Tensor, sites: &Sites, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let (tokens, width) = (x.dim(0), x.width());
        let all = self.qkv.forward(x, sites, cx)?;
        let part =
            |i: usize| all.narrow(1, i * width, width)?.reshape([tokens, self.heads, width / self.heads]);
        let y = self.attend.forward(x, [&part(0)?, &part(1)?, &part(2)?], cx)?;
        self.o.forward(&y.reshape([tokens, width])?, sites, cx)
    }
}
