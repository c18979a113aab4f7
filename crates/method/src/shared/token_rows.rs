//! Chosen rows of a table of tokens that are trained, in it and in what shares its tensor.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use engraft_nn::{
    Base, Builder, Error, Init, Kind, LeftOut, Pass, Patch, Result, Site, Sites, Value as Frozen, WeightPatch,
};
use engraft_tensor::ops::{Pattern, cat};
use engraft_tensor::{Param, Tensor};

use crate::copies::bias_of;
use crate::tied::with_rows;

/// Trains `rows` of the first of `sites`, as the parameter `name`, and puts them into all of them. `peft` adds no bias where
/// it has put rows into a head, and so none is added here.
pub(crate) fn train(b: &mut Builder<'_>, rows: &[usize], name: &str, sites: &[&Site]) -> Result<()> {
    let Some(site) = sites.first() else { return Ok(()) };
    let (Kind::Embedding { rows: count, .. } | Kind::Linear { out: count, .. }) = site.kind else {
        let message = "rows of tables and heads are trained; leave convolutions out of the targets";
        return Err(Error::Site { path: site.path.clone(), message: message.into() });
    };
    if let Some(row) = rows.iter().find(|row| **row >= count) {
        let message = format!("`token_indices` names {row}, and there are {count} rows");
        return Err(Error::Site { path: site.path.clone(), message });
    }
    let Frozen::Weight(weight) = &site.value else {
        let message = "expected a table or a head".into();
        return Err(Error::Site { path: site.path.clone(), message });
    };
    let index = Tensor::from_i64(rows.iter().map(|&r| r as i64).collect(), [rows.len()])?;
    let start = weight.lookup(&index)?;
    let shape = start.shape().to_vec();
    let param = b.param(name, &shape, Init::Values(start))?;
    for site in sites {
        b.patch(site.id, Patch::Weight(Box::new(Rows::new(rows, param.clone(), site)?)))?;
        if let Some(bias) = bias_of(site, b.sites()) {
            b.patch(bias.id, Patch::Vector(Box::new(LeftOut)))?;
        }
    }
    Ok(())
}

/// What surprises where rows of `table` are trained: heads that `peft` changes beyond these rows, or to other values.
pub(crate) fn doubts(table: &Site, sites: &Sites) -> Vec<String> {
    let mut doubts = Vec::new();
    for head in with_rows(sites, table).filter(|s| matches!(s.kind, Kind::Linear { .. })) {
        if head.tensor != table.tensor {
            doubts.push(format!(
                "`{}` has values of its own; as in `peft` the trained rows of the table take the place of its rows, from the start \
                 on. To leave it as it is, name the tables by their own paths, such as `encoder.embed_tokens`",
                head.path
            ));
        }
        if bias_of(head, sites).is_some() {
            doubts.push(format!(
                "as in `peft`, `{}` adds no bias once the rows of its table are trained",
                head.path
            ));
        }
    }
    doubts
}

/// Some rows of a table, or of the head that shares it.
struct Rows {
    param: Param,
    /// Rows of P.
    count: i64,
    /// The order of P in which rows ascend, `I64` `[n]`.
    ascending: Tensor,
    /// The rows as a sparse matrix.
    pattern: Arc<Pattern>,
    /// Which of P a row is: the last, of one that is named twice.
    numbers: HashMap<i64, i64>,
    /// Zero for the rows that are trained, one for the others.
    others: Tensor,
}

impl Rows {
    fn new(rows: &[usize], param: Param, site: &Site) -> Result<Rows> {
        let (Kind::Embedding { rows: out, width: inn } | Kind::Linear { out, inn, .. }) = site.kind else {
            return Err(Error::Site {
                path: site.path.clone(),
                message: "expected a table or a head".into(),
            });
        };
        let numbers: BTreeMap<usize, i64> = rows.iter().copied().zip(0..).collect();
        let places = numbers.keys().flat_map(|&row| (0..inn).map(move |c| (row * inn + c) as u64));
        let mut others = vec![1.0; out];
        rows.iter().for_each(|&row| others[row] = 0.0);
        Ok(Rows {
            others: Tensor::from_vec(others, [out])?,
            pattern: Arc::new(Pattern::new(places, (out, inn), 0)?),
            ascending: Tensor::from_i64(numbers.values().copied().collect(), [numbers.len()])?,
            count: rows.len() as i64,
            numbers: numbers.into_iter().map(|(row, number)| (row as i64, number)).collect(),
            param,
        })
    }
}

impl WeightPatch for Rows {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let dense = base.dense()?;
        let mut index: Vec<i64> = (0..dense.dim(0)).map(|row| self.count + row as i64).collect();
        self.numbers.iter().for_each(|(&row, &number)| index[row as usize] = number);
        let index = Tensor::from_i64(index, [dense.dim(0)])?;
        Ok(cat(&[&self.param.get(), &dense], 0)?.gather(&index)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let own = self.param.get().gather(&self.ascending)?;
        let own = own.reshape([own.len()])?;
        Ok(base.forward(x)?.mul(&self.others)?.add_sparse(x, &own, &self.pattern)?)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let count = self.count;
        let own = |(token, id): (i64, &i64)| self.numbers.get(id).copied().unwrap_or(count + token);
        let index: Vec<i64> = (0..).zip(ids.ids()?).map(own).collect();
        // Also where no row is one of them: their gradient is then zero, and what moves them moves them on, as in PyTorch.
        let index = Tensor::from_i64(index, [ids.len()])?;
        Ok(cat(&[&self.param.get(), &base.lookup(ids)?], 0)?.gather(&index)?)
    }
}
