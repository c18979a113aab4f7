//! A frozen linear layer; every one is a site, and so is its bias.

use engraft_tensor::Tensor;
use std::sync::Arc;

use crate::{Base, Kind, Pass, Patch, Result, Role, Site, SiteId, Sites, Value, Weight, WeightPatch};

/// y = x·Wᵀ + b with frozen W [out, in] and b `[out]`.
#[derive(Clone)]
pub struct Linear {
    weight: Arc<Weight>,
    site: SiteId,
    bias: Option<(Tensor, SiteId)>,
}

impl Linear {
    /// Declares the sites `path` and, with a bias, `path.bias`. `tensor` is the module's name in the model's files.
    pub fn declare(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        role: Role,
        layer: Option<usize>,
        weight: Arc<Weight>,
        bias: Option<Tensor>,
    ) -> Linear {
        let names = (format!("{path}.bias"), format!("{tensor}.bias"));
        let bias = bias.map(|b| (b, (names.0.as_str(), names.1.as_str())));
        Self::declare_named(sites, (path, &format!("{tensor}.weight")), role, layer, weight, bias)
    }

    /// As [`Linear::declare`], each (path, name in the files) given in full: for heads whose weight or bias is shared or
    /// lies elsewhere.
    pub fn declare_named(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        role: Role,
        layer: Option<usize>,
        weight: Arc<Weight>,
        bias: Option<(Tensor, (&str, &str))>,
    ) -> Linear {
        let (out, inn) = weight.shape();
        let kind = Kind::Linear { out, inn, transposed: weight.transposed() };
        Self::declare_kind(sites, (path, tensor), role, layer, kind, weight, bias)
    }

    /// The matrix of a convolution on windows of [channels, height, width] numbers.
    pub(crate) fn declare_convolution(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        role: Role,
        [channels, height, width]: [usize; 3],
        weight: Arc<Weight>,
        bias: Option<Tensor>,
    ) -> Linear {
        let (out, inn) = weight.shape();
        let kind = Kind::Convolution { out, inn, shape: [out, channels, height, width] };
        let names = (format!("{path}.bias"), format!("{tensor}.bias"));
        let bias = bias.map(|b| (b, (names.0.as_str(), names.1.as_str())));
        Self::declare_kind(sites, (path, &format!("{tensor}.weight")), role, None, kind, weight, bias)
    }

    fn declare_kind(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        role: Role,
        layer: Option<usize>,
        kind: Kind,
        weight: Arc<Weight>,
        bias: Option<(Tensor, (&str, &str))>,
    ) -> Linear {
        let site = sites.add_value(path, role, layer, kind, Value::Weight(weight.clone()), tensor);
        let bias = bias.map(|(b, (path, tensor))| {
            let (kind, value) = (Kind::Vector { len: b.len() }, Value::Vector(b.clone()));
            let id = sites.add_value(path, Role::Bias, layer, kind, value, tensor);
            (b, id)
        });
        Linear { weight, site, bias }
    }

    /// The site of the weight.
    pub fn site(&self) -> SiteId {
        self.site
    }

    /// The frozen weight.
    pub(crate) fn weight(&self) -> &Arc<Weight> {
        &self.weight
    }

    /// The frozen bias and its site.
    pub(crate) fn bias(&self) -> Option<(&Tensor, SiteId)> {
        self.bias.as_ref().map(|(bias, id)| (bias, *id))
    }

    /// Whether any route has a patch at the weight or at the bias.
    pub(crate) fn patched(&self, cx: &Pass) -> bool {
        cx.patched(self.site) || self.bias.as_ref().is_some_and(|(_, id)| cx.patched(*id))
    }

    /// x [tokens, in] → [tokens, out].
    pub fn forward(&self, x: &Tensor, sites: &Sites, cx: &Pass) -> Result<Tensor> {
        if !self.patched(cx) {
            return self.weight.multiply(x, self.bias.as_ref().map(|(b, _)| b));
        }
        let site = sites.get(self.site);
        let patched = |x: &Tensor, patches: &[Patch], cx: &Pass| {
            Patched::new(self.weight.as_ref(), patches, site, cx).forward(x)
        };
        let y = cx.by_route(self.site, x, patched)?;
        let Some((bias, id)) = &self.bias else { return Ok(y) };
        if !cx.patched(*id) {
            return Ok(y.plus(bias)?);
        }
        cx.by_route(*id, &y, |y, patches, _| Ok(y.add(&patched_vector(bias, patches)?)?))
    }
}

/// v after the vector patches.
pub(crate) fn patched_vector(v: &Tensor, patches: &[Patch]) -> Result<Tensor> {
    let mut v = v.clone();
    for patch in patches {
        if let Patch::Vector(p) = patch {
            v = p.vector(&v)?;
        }
    }
    Ok(v)
}

/// A weight under the patches of a site: each patch sees what the ones before it made.
pub struct Patched<'a> {
    base: &'a dyn Base,
    patches: &'a [Patch],
    site: &'a Site,
    cx: &'a Pass,
}

impl<'a> Patched<'a> {
    /// `base` under `patches`, the last outermost.
    pub fn new(base: &'a dyn Base, patches: &'a [Patch], site: &'a Site, cx: &'a Pass) -> Self {
        Patched { base, patches, site, cx }
    }

    /// The outermost weight patch and what it sees.
    fn outermost(&self) -> Option<(&dyn WeightPatch, Patched<'a>)> {
        let (last, before) = self.patches.split_last()?;
        let inner = Patched { patches: before, ..*self };
        match last {
            Patch::Weight(p) => Some((p.as_ref(), inner)),
            _ => None,
        }
    }
}

impl Base for Patched<'_> {
    fn shape(&self) -> (usize, usize) {
        self.base.shape()
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.outermost() {
            Some((patch, inner)) => patch.forward(x, &inner, self.site, self.cx),
            None => self.base.forward(x),
        }
    }

    fn lookup(&self, ids: &Tensor) -> Result<Tensor> {
        match self.outermost() {
            Some((patch, inner)) => patch.lookup(ids, &inner, self.site, self.cx),
            None => self.base.lookup(ids),
        }
    }

    fn dense(&self) -> Result<Tensor> {
        match self.outermost() {
            Some((patch, inner)) => patch.weight(&inner),
            None => self.base.dense(),
        }
    }

    fn row_squares(&self) -> Result<Option<Tensor>> {
        if self.patches.is_empty() { self.base.row_squares() } else { Ok(None) }
    }
}
