//! Principal angles between the spans of two sets of rows.

use nalgebra::DMatrix;

/// Rows whose remainder falls below this share of the largest add no direction: f32 rounding of factors.
const DEPENDENT: f64 = 1e-6;

/// Angles in radians, smallest first, as many as the smaller span has dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Angles {
    /// The angles.
    pub radians: Vec<f64>,
    /// Dimensions of both spans.
    pub dimensions: [usize; 2],
}

/// Angles between the spans of rows of `n` columns; cosines for large angles, sines for small ones (Bjorck and
/// Golub, Numerical methods for computing angles between linear subspaces, 1973).
pub fn principal_angles(x: &[f32], y: &[f32], n: usize) -> Angles {
    let (p, q) = (basis(x, n), basis(y, n));
    let dimensions = [p.ncols(), q.ncols()];
    let count = dimensions[0].min(dimensions[1]);
    if count == 0 {
        return Angles { radians: Vec::new(), dimensions };
    }
    // The smaller span against the larger: then every sine belongs to a cosine.
    let (p, q) = if p.ncols() >= q.ncols() { (p, q) } else { (q, p) };
    let inner = p.transpose() * &q;
    let outside = &q - &p * &inner;
    let sorted = |m: DMatrix<f64>| {
        let mut s: Vec<f64> = m.singular_values().iter().map(|v| v.clamp(0.0, 1.0)).collect();
        s.sort_by(f64::total_cmp);
        s
    };
    let (mut cosines, sines) = (sorted(inner), sorted(outside));
    cosines.reverse();
    let angle = |(c, s): (&f64, &f64)| if s * s < 0.5 { s.asin() } else { c.acos() };
    Angles { radians: cosines.iter().zip(&sines).map(angle).collect(), dimensions }
}

/// Orthonormal columns that span the rows.
fn basis(rows: &[f32], n: usize) -> DMatrix<f64> {
    let rank = rows.len() / n;
    let qr = DMatrix::from_fn(n, rank, |i, j| f64::from(rows[j * n + i])).col_piv_qr();
    let r = qr.r();
    let largest = r[(0, 0)].abs();
    let real = (0..r.nrows()).take_while(|&i| largest > 0.0 && r[(i, i)].abs() > DEPENDENT * largest).count();
    qr.q().columns(0, real).clone_owned()
}
