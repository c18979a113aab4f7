//! FRoD: all weights of one kind have a basis in common, in which each is turned and scaled.
//!
//! W′ = U·(S + Λ)·Vᵀ. V [in, in] is made of the weights of all targets of a kind (the same projection in every block): of the
//! stacked weights, Wᵢ one below the other, QR gives slices Qᵢ and R; V = Rᵀ·E with the eigenvectors E, eigenvalues rising, of
//! the mean of (QᵢᵀQᵢ + α·I)⁻¹ (the hierarchical decomposition of several matrices at once). Where the stack has fewer rows
//! than columns, V holds its right singular vectors, completed to a basis. Each weight then is W = U·Λ₀·Vᵀ with unit columns
//! of U. Λ is trained, and S beside the diagonal at places that are drawn once a kind; S starts as zero and Λ as Λ₀, so
//! W′ = W. The forward is y = x·Wᵀ + ((x·V)·(S + Λ − Λ₀)ᵀ)·Uᵀ, which leaves W to the base.
//!
//! "FRoD", AAAI 2026, doi 10.1609/aaai.v40i31.39813, in `peft`'s form, whose kinds are the last parts of paths: in T5 a
//! decoder's weights count in place of the encoder's, and both use their basis. U follows from W and V and is in no file. V is,
//! because it is determined by the weights only up to the signs of its columns, and where eigenvalues are equal (always
//! with a single layer) not even so far: `peft` itself makes another one with another number of threads. So a file without
//! it, `save_projection` off, is refused, and never written. When it loads a file `peft` takes U from the basis that it makes
//! anew, not from the file's: an adapter that began here has a type of its own, and one that began in `peft` keeps `peft`'s.
//!
//! frod_lambda_l (diagonal of Λ) `[in]` and frod_lambda_s_values (S) `[k]` a target; frod_V.KIND [in, in], frod_s_indices.KIND
//! (rows and columns of S) [2, k] and frod_s_size.KIND [2], whole numbers. k = ⌊in²·sparse_rate⌋, at least 1 unless the rate is 0.

use std::sync::Arc;

use engraft_nn::weight::Weight;
use engraft_nn::{
    Adapter, Base, Builder, Error, Init, Numbers, Pass, Patch, Result, Role, Site, Value as Frozen,
    WeightPatch,
};
use engraft_tensor::ops::Pattern;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, float, int};
use crate::shared::kept::Kept;
use crate::shared::matrices;
use crate::shared::torch_random::{Generator, Seed};
use crate::{Described, Entry, Info, Loaded, Method, peft};

mod basis;

use basis::{Kind, Parts, common_basis, kinds};

/// What stands for the biases of the targets.
const OF_TARGETS: &str = "frod_only";
/// Names of what a kind has.
const BASIS: &str = "frod_V.";
const PLACES: &str = "frod_s_indices.";
const SIZE: &str = "frod_s_size.";

struct Frod {
    rate: f64,
    ridge: f64,
    dropout: f32,
    seed: Seed,
    bias: Biases,
    init_weights: bool,
    /// What a file says about how `peft` works.
    unused: [bool; 2],
    /// Whether it was read from a file, which has the bases.
    from_file: bool,
    /// Whether that file was one of `peft`, with the basis that `peft` makes again.
    of_peft: bool,
}

static INFO: Info = Info {
    name: "frod",
    title: "FRoD",
    class: "reparameterized",
    sites: "weight",
    paper: "AAAI 2026, doi 10.1609/aaai.v40i31.39813",
    summary: "W′ = U·(S + Λ)·Vᵀ in a basis that all weights of a kind share, Λ and the sparse S trained; files of `peft` are read, what began here has a type of its own",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "FROD",
    fields: &[
        float(
            "sparse_rate",
            (0.0, 1.0),
            "0.01",
            "Share of the entries beside the diagonal that are trained.",
        ),
        float(
            "regularization_alpha",
            (1e-9, 1e3),
            "0.001",
            "What keeps the inverses of the decomposition finite.",
        ),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of the change while training."),
        int(
            "projection_prng_key",
            (0, u32::MAX as i64),
            Some("0"),
            "Seed of the places of S, as PyTorch draws from it.",
        ),
        choice(
            "bias",
            &["none", "all", OF_TARGETS],
            "\"none\"",
            "Which biases of the model are trained too.",
        ),
    ],
};

/// The type of an adapter whose basis was found here: `peft` takes U from a basis that it makes anew, whatever the file holds.
const OWN_TYPE: &str = "ENGRAFT_FROD";

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, "dropout"))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let of_peft = peft::is_type(config, INFO.peft_type);
    let ours = of_peft || peft::is_type(config, OWN_TYPE);
    if ours && config.get("save_projection") == Some(&json!(false)) {
        let message = "an adapter of peft_type FROD with `save_projection` = false has entries of a matrix but not the basis \
                       it is in, which peft makes anew with signs that depend on the library and the number of threads; \
                       save it with `save_projection` = true where it was trained, or merge it there";
        return Err(Error::Unsupported(message.into()));
    }
    peft::file_of(if of_peft { INFO.peft_type } else { OWN_TYPE }, config, |r| {
        r.ignore(&["fan_in_fan_out", "save_projection"]);
        let unused = [r.flag("progressbar", true), r.flag("runtime_offload_base_weight", false)];
        Frod { unused, from_file: true, of_peft, ..read(r, "frod_dropout") }
    })
}

fn read(r: &mut Reader<'_>, dropout: &'static str) -> Frod {
    let frod = Frod {
        rate: r.float("sparse_rate", 0.01),
        ridge: r.float("regularization_alpha", 1e-3),
        dropout: r.dropout(dropout),
        seed: r.torch_seed("projection_prng_key", 0),
        bias: Biases::read(r, OF_TARGETS),
        init_weights: !r.is_file() || r.flag("init_weights", true),
        unused: [true, false],
        from_file: false,
        of_peft: false,
    };
    if !(0.0..=1.0).contains(&frod.rate) {
        r.problem(format!("`sparse_rate`: expected a number from 0 to 1, found {}", frod.rate));
    }
    frod
}

fn example() -> Box<dyn Method> {
    let frod = Frod {
        rate: 0.05,
        ridge: 1e-3,
        dropout: 0.0,
        seed: Seed::of(3),
        bias: Biases::None,
        init_weights: true,
        unused: [true, false],
        from_file: false,
        of_peft: false,
    };
    Box::new(frod)
}

impl Method for Frod {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        let numbers = b.sites().numbers();
        let mut generator = Generator::new(self.seed);
        for (name, kind) in kinds(b.targets())? {
            let shared = Arc::new(self.shared(b, &name, &kind, numbers, &mut generator)?);
            for site in kind.sites {
                self.attach_at(b, site, shared.clone())?;
            }
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "fan_in_fan_out": false, "frod_dropout": as_written(self.dropout),
            "init_weights": self.init_weights, "layers_pattern": null, "layers_to_transform": null,
            "progressbar": self.unused[0], "projection_prng_key": self.seed.written(), "regularization_alpha": number(self.ridge),
            "runtime_offload_base_weight": self.unused[1], "save_projection": true, "sparse_rate": number(self.rate),
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_type(&self, _adapter: &Adapter) -> &'static str {
        if self.of_peft { INFO.peft_type } else { OWN_TYPE }
    }

    fn doubts(&self, _targets: &[&Site]) -> Vec<String> {
        if self.of_peft {
            return Vec::new();
        }
        vec![format!(
            "`peft` finds the directions of FRoD anew when it loads an adapter, with signs of its own, and would change the model: \
             the adapter is saved as {OWN_TYPE}, which Engraft alone reads; one that began in a file of `peft` (`from`) stays `peft`'s"
        )]
    }

    /// What a kind has belongs to the model as a whole.
    fn file_name(&self, name: &str) -> String {
        let whole = [BASIS, PLACES, SIZE].iter().any(|shared| name.starts_with(shared));
        if whole { format!("base_model.{name}") } else { format!("base_model.model.{name}") }
    }

    fn in_type_of_model(&self, key: &str) -> bool {
        key.strip_prefix("base_model.").is_some_and(|key| key.starts_with(BASIS))
    }
}

impl Frod {
    /// Number of entries of S beside a diagonal of `width`.
    fn entries(&self, width: usize) -> usize {
        let (all, beside) = (width * width, width * width - width);
        let count = ((all as f64 * self.rate) as usize).min(beside);
        if self.rate > 0.0 && beside > 0 { count.max(1) } else { count }
    }

    /// The basis and the places of one kind.
    fn shared(
        &self,
        b: &mut Builder<'_>,
        name: &str,
        kind: &Kind<'_>,
        numbers: Numbers,
        generator: &mut Generator,
    ) -> Result<Shared> {
        let (n, count) = (kind.width, self.entries(kind.width));
        let (mut basis, mut places) = (Tensor::zeros([n, n]), vec![0; 2 * count]);
        if !self.from_file {
            let weights: Vec<Tensor> =
                kind.makers.values().map(|s| matrices::frozen(s)).collect::<Result<_>>()?;
            // As the file will have it, so that it means the same when it is read.
            basis = numbers.rounded(&common_basis(&weights, self.ridge)?)?;
            let beside = if self.rate > 0.0 { n * n - n } else { 0 };
            for (i, place) in generator.whole_permutation(beside, count).into_iter().enumerate() {
                // Places are counted without the diagonal.
                let (row, column) = (place / (n - 1), place % (n - 1));
                (places[i], places[count + i]) = (row as i64, (column + usize::from(column >= row)) as i64);
            }
        }
        let size = Tensor::from_i64(vec![n as i64; 2], [2])?;
        b.fixed(&format!("{SIZE}{name}"), &[2], Init::Values(size))?;
        let places = Init::Values(Tensor::from_i64(places, [2, count])?);
        Ok(Shared {
            basis: b.fixed(&format!("{BASIS}{name}"), &[n, n], Init::Values(basis))?,
            places: b.fixed(&format!("{PLACES}{name}"), &[2, count], places)?,
            pattern: Kept::new(),
        })
    }

    fn attach_at(&self, b: &mut Builder<'_>, site: &Site, shared: Arc<Shared>) -> Result<()> {
        let Frozen::Weight(weight) = &site.value else {
            return Err(Error::Site {
                path: site.path.clone(),
                message: "expected a weight, found none".into(),
            });
        };
        let (n, name) = (shared.basis.value().dim(0), |end: &str| format!("{}.frod_lambda_{end}", site.path));
        let parts = Kept::new();
        let start = match self.from_file {
            true => Tensor::zeros([n]),
            false => parts.read(&shared.basis, |v| Parts::new(weight, v).map(Arc::new))?.start.clone(),
        };
        let count = shared.places.value().dim(1);
        let entries = match count {
            // Nothing to train, and in the file all the same.
            0 => b.fixed(&name("s_values"), &[0], Init::Zeros)?,
            _ => b.param(&name("s_values"), &[count], Init::Zeros)?,
        };
        let scales = b.param(&name("l"), &[n], Init::Values(start))?;
        let (weight, dropout) = (weight.clone(), self.dropout);
        let patch = Turned { shared, parts, weight, scales, entries, dropout };
        b.patch(site.id, Patch::Weight(Box::new(patch)))
    }
}

/// What a kind has.
struct Shared {
    basis: Param,
    places: Param,
    pattern: Kept<Arc<Places>>,
}

/// The places of S in the order of rows, and where their values are among those of the file.
struct Places {
    pattern: Arc<Pattern>,
    order: Tensor,
}

impl Places {
    fn new(indices: &Tensor, n: usize) -> Result<Places> {
        let indices = indices.to_i64()?;
        let (rows, columns) = indices.split_at(indices.len() / 2);
        let outside = |i: &&i64| **i < 0 || **i >= n as i64;
        if let Some(place) = indices.iter().find(outside) {
            return Err(Error::Mismatch(vec![format!("{PLACES}: {place} is outside 0..{n}")]));
        }
        let flat: Vec<u64> =
            rows.iter().zip(columns).map(|(r, c)| *r as u64 * n as u64 + *c as u64).collect();
        let mut order: Vec<i64> = (0..flat.len() as i64).collect();
        order.sort_by_key(|&i| flat[i as usize]);
        let sorted = order.iter().map(|&i| flat[i as usize]);
        let pattern = Arc::new(Pattern::with_repeats(sorted, (n, n), 0)?);
        Ok(Places { pattern, order: Tensor::from_i64(order, [flat.len()])? })
    }
}

/// U·(S + Λ − Λ₀)·Vᵀ at one matrix.
struct Turned {
    shared: Arc<Shared>,
    parts: Kept<Arc<Parts>>,
    weight: Arc<Weight>,
    scales: Param,
    entries: Param,
    dropout: f32,
}

impl Turned {
    fn parts(&self) -> Result<Arc<Parts>> {
        self.parts.read(&self.shared.basis, |v| Parts::new(&self.weight, v).map(Arc::new))
    }

    /// The pattern of S and its values in that order; `None` where it has no entries.
    fn sparse(&self) -> Result<Option<(Arc<Pattern>, Tensor)>> {
        let (places, n) = (&self.shared.places, self.scales.value().len());
        if places.value().is_empty() {
            return Ok(None);
        }
        let places = self.shared.pattern.read(places, |indices| Places::new(indices, n).map(Arc::new))?;
        Ok(Some((places.pattern.clone(), self.entries.get().gather(&places.order)?)))
    }
}

impl WeightPatch for Turned {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let parts = self.parts()?;
        let n = self.scales.value().len();
        let scaled = self.scales.get().sub(&parts.start)?.reshape([n, 1])?;
        let mut left = parts.u.mul(&scaled)?.t()?;
        if let Some((pattern, entries)) = self.sparse()? {
            let entries = Tensor::zeros([n, n]).scatter_sparse(&entries, &pattern)?;
            left = left.add(&parts.u.t_matmul(&entries)?)?;
        }
        Ok(base.dense()?.add(&left.matmul_t(&self.shared.basis.get())?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let parts = self.parts()?;
        let z = cx.dropout(x, self.dropout, site.id, 0)?.matmul(&self.shared.basis.get())?;
        let mut turned = z.mul(&self.scales.get().sub(&parts.start)?)?;
        if let Some((pattern, entries)) = self.sparse()? {
            turned = turned.add_sparse(&z, &entries, &pattern)?;
        }
        Ok(base.forward(x)?.plus(&turned.matmul(&parts.u)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::basis::kind_of;
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn a_diagonal_and_some_entries_of_each_target_are_trained() {
        // q has 6 inputs and 36·0.1 = 3 entries, as has v; the two layers share bases.
        let a = attached(&[chosen("frod", json!({ "sparse_rate": 0.1 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 4 * (6 + 3));
        assert_eq!(names(&a).iter().filter(|name| name.starts_with(BASIS)).count(), 2);
        let x = sample(&[5, 6], 3);
        for path in ["layers.0.attn.q", "layers.1.attn.v"] {
            close(&both_ways(&a, path, &x).0, &x.matmul_t(&frozen(path)).unwrap(), 1e-6);
        }
        stir(&a, 0.5);
        for path in ["layers.0.attn.q", "layers.1.attn.v"] {
            let (fast, defined) = both_ways(&a, path, &x);
            close(&fast, &defined, 1e-5);
            // The definition, from the file's tensors alone.
            let of = |name: &str| value_of(&a, name);
            let v = of(&format!("{BASIS}{}", kind_of(path)));
            let weight = engraft_nn::Weight::table(rows_of(&frozen(path)), None);
            let parts = Parts::new(&weight, &v).unwrap();
            let mut turned = vec![0.0; 36];
            let entries = of(&format!("{path}.frod_lambda_s_values")).to_vec().unwrap();
            let places = of(&format!("{PLACES}{}", kind_of(path))).to_i64().unwrap();
            for i in 0..3 {
                turned[(places[i] * 6 + places[3 + i]) as usize] += entries[i];
            }
            for (i, l) in of(&format!("{path}.frod_lambda_l")).to_vec().unwrap().into_iter().enumerate() {
                turned[7 * i] += l;
            }
            let turned = Tensor::from_vec(turned, [6, 6]).unwrap();
            let whole = parts.u.t_matmul(&turned).unwrap().matmul_t(&v).unwrap();
            close(&merged(&a, path), &whole, 1e-4);
        }
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "sparse_rate": 0, "dropout": 0.1, "bias": "frod_only" }),
            json!({ "sparse_rate": 1, "regularization_alpha": 0.1, "projection_prng_key": 5, "bias": "all" }),
        ] {
            survives_saving(&[chosen("frod", settings)], &["head"]);
        }
        let good = config(&[chosen("frod", json!({}))], &[]);
        assert_eq!((&good["save_projection"], &good["sparse_rate"]), (&json!(true), &json!(0.01)));
        // What began here is not `peft`'s; what came from `peft` stays so.
        assert_eq!(good["peft_type"], OWN_TYPE);
        let read = |config: &Value| from_file(config).unwrap().unwrap().method;
        assert_eq!(read(&good).doubts(&[]).len(), 1);
        let of_peft = read(&with(good.clone(), json!({ "peft_type": "FROD" })));
        assert!(of_peft.doubts(&[]).is_empty());
        assert_eq!(config(&[(of_peft, None)], &[])["peft_type"], "FROD");
        for bad in
            [json!({ "sparse_rate": 1.5 }), json!({ "bias": "some" }), json!({ "save_projection": false })]
        {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
        let error = from_file(&with(good, json!({ "save_projection": false }))).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("number of threads"), "{error}");
        let (sites, info) = toy();
        let mixed = [(chosen("frod", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
        assert!(crate::attach(&mixed, &[], &sites, &info, 0).is_err(), "a table has no such form");
    }
}
