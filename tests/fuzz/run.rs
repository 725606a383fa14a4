//! One target over its kept corpus, its regressions, and mutations of them: the same ones every time.

use std::any::Any;
use std::fs;
use std::io::{Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

use super::memory;
use super::mutate::{Shape, mutate};

/// One parser.
pub struct Target {
    /// Name of the fuzz target, and of its folders.
    pub name: &'static str,
    /// How its bytes are put together.
    pub shape: Shape,
    /// The entry: true when the bytes were read. It panics where a parser breaks its word.
    pub entry: fn(&[u8]) -> bool,
    /// Mutations in a usual run.
    pub rounds: u64,
}

/// An input that runs longer than this hangs.
const HANGS: Duration = Duration::from_secs(60);

/// Memory is counted for the whole process, so one target runs at a time.
static ONE: Mutex<()> = Mutex::new(());
/// What the parser under test took beyond what it may: set while an entry runs.
static BROKEN: Mutex<Option<String>> = Mutex::new(None);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// The corpus of a target, which its writers made.
pub fn corpus_of(name: &str) -> PathBuf {
    root().join("corpus").join(name)
}

fn regressions_of(name: &str) -> PathBuf {
    root().join("regressions").join(name)
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|p| (p.display().to_string(), fs::read(p).unwrap())).collect()
}

/// What entries call around a parser: it may take so much for a file of `len` bytes.
pub fn watched(len: usize, read: &mut dyn FnMut()) {
    if let Err(what) = memory::measure(read).check(len) {
        BROKEN.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
    }
}

/// Where inputs are written that fail, and the one that runs: outside of what is kept.
struct Desk {
    dir: PathBuf,
    current: fs::File,
    path: PathBuf,
    started: Arc<AtomicU64>,
    clock: Instant,
}

impl Desk {
    fn new(name: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join(format!("{name}.current"));
        let (clock, started) = (Instant::now(), Arc::new(AtomicU64::new(u64::MAX)));
        let (since, shown) = (started.clone(), path.clone());
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(500));
                let running = (clock.elapsed().as_millis() as u64).checked_sub(since.load(Relaxed));
                if running.is_some_and(|ms| ms > HANGS.as_millis() as u64) {
                    eprintln!("an input hangs: it is {}", shown.display());
                    std::process::abort();
                }
            }
        });
        Desk { dir, current: fs::File::create(&path).unwrap(), path, started, clock }
    }

    /// Keeps the input where an abort leaves it, and starts its time.
    fn start(&mut self, input: &[u8]) {
        self.current.rewind().and_then(|()| self.current.set_len(0)).unwrap();
        self.current.write_all(input).unwrap();
        self.started.store(self.clock.elapsed().as_millis() as u64, Relaxed);
    }

    fn stop(&self) {
        self.started.store(u64::MAX, Relaxed);
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into())
}

/// Runs one input; true when it was read.
fn run(target: &Target, desk: &mut Desk, input: &[u8], origin: &str) -> bool {
    desk.start(input);
    *BROKEN.lock().unwrap_or_else(PoisonError::into_inner) = None;
    let got = catch_unwind(AssertUnwindSafe(|| (target.entry)(input)));
    desk.stop();
    let broken = BROKEN.lock().unwrap_or_else(PoisonError::into_inner).take();
    let what = match (got, broken) {
        (Ok(read), None) => return read,
        (Ok(_), Some(what)) => what,
        (Err(panic), _) => words(&*panic),
    };
    let hash = Sha256::digest(input);
    let path = desk
        .dir
        .join(format!("{}-{:02x}{:02x}{:02x}{:02x}", target.name, hash[0], hash[1], hash[2], hash[3]));
    fs::write(&path, input).unwrap();
    let Target { name, .. } = target;
    panic!(
        "{name}: {what}\n  input: {} bytes, {origin}, written to {}\n  replay: MICROLORA_FUZZ_REPLAY={} cargo test \
         --test fuzz -- --exact {name}\n  when it is mended, keep it in fuzz/regressions/{name}/",
        input.len(),
        path.display(),
        path.display()
    );
}

/// Corpus, regressions, then mutations: a fixed number, or as many as `MICROLORA_FUZZ_SECONDS` lets pass.
pub fn target(target: &Target) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let name = target.name;
    let mut desk = Desk::new(name);
    if let Some(path) = std::env::var_os("MICROLORA_FUZZ_REPLAY") {
        let read = run(target, &mut desk, &fs::read(&path).unwrap(), "replayed");
        println!("{}: {}", path.display(), if read { "read" } else { "refused" });
        return;
    }
    let mut seeds = files(&corpus_of(name));
    assert!(!seeds.is_empty(), "no corpus of {name}: make fuzz-corpus");
    for (path, seed) in &seeds {
        let read = run(target, &mut desk, seed, path);
        assert!(read, "{path} is a sound file, and was refused: make fuzz-corpus writes it anew");
    }
    seeds.extend(files(&regressions_of(name)));
    for (path, seed) in &seeds {
        run(target, &mut desk, seed, path);
    }

    let seconds: Option<u64> =
        std::env::var("MICROLORA_FUZZ_SECONDS").ok().map(|s| s.parse().expect("seconds"));
    let first: u64 = std::env::var("MICROLORA_FUZZ_SEED").map_or(0, |s| s.parse().expect("a number"));
    let (start, mut read, mut round) = (Instant::now(), 0u64, 0u64);
    while seconds.map_or(round < target.rounds, |s| start.elapsed() < Duration::from_secs(s)) {
        // Each round by itself is made from its number alone.
        let mut rng = ChaCha8Rng::seed_from_u64(first.wrapping_mul(1 << 40).wrapping_add(round));
        let seed = &seeds[round as usize % seeds.len()].1;
        let other = &seeds[(round / 7) as usize % seeds.len()].1;
        let input = mutate(target.shape, seed, other, &mut rng);
        read += u64::from(run(target, &mut desk, &input, &format!("seed {first}, round {round}")));
        round += 1;
    }
    println!("{name}: {round} mutations, {read} of them read, in {:.1?}", start.elapsed());
    // Mutations that are never read do not reach what lies behind the first checks.
    assert!(round < 1000 || read > 0, "{name}: none of {round} mutations was read");
    fs::remove_file(&desk.path).unwrap();
}

/// The kept corpus of a target.
pub fn seeds(target: &Target) -> Vec<Vec<u8>> {
    files(&corpus_of(target.name)).into_iter().map(|(_, bytes)| bytes).collect()
}

/// One input; true when it was read.
pub fn one(target: &Target, input: &[u8]) -> bool {
    let _one = alone();
    *BROKEN.lock().unwrap_or_else(PoisonError::into_inner) = None;
    let read = (target.entry)(input);
    let broken = BROKEN.lock().unwrap_or_else(PoisonError::into_inner).take();
    assert!(broken.is_none(), "{}: {}", target.name, broken.unwrap_or_default());
    read
}

/// One hand-made input, for what it takes.
pub fn bomb(target: &Target, name: &str, input: &[u8]) {
    let mut desk = Desk::new(&format!("{}-{name}", target.name));
    let read = run(target, &mut desk, input, name);
    println!("{} {name}: {} bytes, {}", target.name, input.len(), if read { "read" } else { "refused" });
    fs::remove_file(&desk.path).unwrap();
}

/// Holds every other target of this process back.
pub fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}
