//! Quantiles of the beta distribution with both parameters 0.6, the only one
//! that a ramp of sigmas uses (Lee et al. 2024, arXiv 2407.12173). This is no
//! statistics library: other parameters are deliberately out of reach.

/// Both parameters of the distribution.
const SHAPE: f64 = 0.6;
/// The beta function at (0.6, 0.6), in whose units the density is measured.
const BETA_FUNCTION: f64 = 2.415_344_208_002_472_3;

/// The x in [0, 1] below which a share `p` of the distribution lies.
pub(super) fn quantile(p: f64) -> f64 {
    if p > 0.5 {
        // The distribution is symmetric, and its share is found best near 0.
        return 1.0 - quantile(1.0 - p);
    }
    // The share grows with x, so halving the interval finds it: 80 times
    // leaves less than float64 can tell apart.
    let (mut low, mut high) = (0.0, 0.5);
    for _ in 0..80 {
        let middle = 0.5 * (low + high);
        if share_below(middle) < p { low = middle } else { high = middle }
    }
    if p <= 0.0 { 0.0 } else { high }
}

/// Share of the distribution below `x`, for x of at most one half: the power
/// series of the incomplete beta function, whose terms fall at least by halves.
fn share_below(x: f64) -> f64 {
    let mut factor = 1.0;
    let mut sum = 1.0 / SHAPE;
    for n in 1..200 {
        let n = f64::from(n);
        factor *= (n - SHAPE) / n * x;
        let term = factor / (SHAPE + n);
        sum += term;
        if term < sum * 1e-17 {
            break;
        }
    }
    x.powf(SHAPE) * sum / BETA_FUNCTION
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_scipy() {
        // scipy.stats.beta.ppf(p, 0.6, 0.6) of scipy 1.17.
        let cases = [
            (0.0, 0.0),
            (0.01, 0.0008612388215429059),
            (0.1, 0.03958440558878085),
            (0.3, 0.23401700387523572),
            (0.5, 0.5),
            (0.947_368_421_052_631_5, 0.9863289184355307),
            (1.0, 1.0),
        ];
        for (p, x) in cases {
            assert!((quantile(p) - x).abs() < 1e-13, "{p}: {} for {x}", quantile(p));
        }
    }
}
