//! AMX tiles in plain Rust, for tests on machines that have none: an
//! interpreter of the very lines that `asm!` would assemble. It knows the
//! instructions that kernels here use and refuses all others, and every use of
//! tiles that the processor would fault on.

use std::cell::RefCell;

use half::bf16;

/// Rows of a tile.
const ROWS: usize = 16;
/// 32-bit words of a row.
const WORDS: usize = 16;

/// The eight tile registers.
type Registers = [[[u32; WORDS]; ROWS]; 8];

thread_local! {
    /// The tiles of this thread while it emulates them.
    static TILES: RefCell<Option<Box<Registers>>> = const { RefCell::new(None) };
}

/// From now on this thread's tiles are emulated, until they are released.
pub(super) fn start() {
    TILES.with_borrow_mut(|tiles| {
        assert!(tiles.is_none(), "this thread's tiles are configured already");
        *tiles = Some(Box::new([[[0; WORDS]; ROWS]; 8]));
    });
}

/// A value of a general register.
pub(crate) trait Word {
    fn word(self) -> usize;
}

impl Word for usize {
    fn word(self) -> usize {
        self
    }
}

impl<T> Word for *const T {
    fn word(self) -> usize {
        self.expose_provenance()
    }
}

impl<T> Word for *mut T {
    fn word(self) -> usize {
        self.expose_provenance()
    }
}

/// Runs lines of assembly if this thread emulates its tiles; `false` if it
/// does not, and the processor has to run them.
pub(crate) fn run(lines: &[&str], registers: &mut [(&str, usize)]) -> bool {
    TILES.with_borrow_mut(|state| {
        let Some(tiles) = state else { return false };
        let released = interpret(tiles, lines, registers);
        if released {
            *state = None;
        }
        true
    })
}

/// Runs lines; whether they gave the tiles back.
fn interpret(tiles: &mut Registers, lines: &[&str], registers: &mut [(&str, usize)]) -> bool {
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        at += 1;
        let line = line.trim();
        let (name, operands) = line.split_once(' ').unwrap_or((line, ""));
        let operands: Vec<&str> = operands.split(", ").filter(|o| !o.is_empty()).collect();
        match (name, &operands[..]) {
            ("2:", []) => {}
            ("add", [register, number]) => *register_mut(registers, register) += parse(number),
            ("dec", [register]) => *register_mut(registers, register) -= 1,
            ("jnz", ["2b"]) => {
                // The only flags that anything sets before a jump are those of `dec`.
                let counter = lines[at - 2].trim().strip_prefix("dec ").expect("a jump behind a count");
                if *register_mut(registers, counter) != 0 {
                    at = lines.iter().position(|line| line.trim() == "2:").expect("a label");
                }
            }
            ("tilezero", [tile]) => tiles[number(tile)] = [[0; WORDS]; ROWS],
            ("tileloadd" | "tileloaddt1", [tile, memory]) => {
                let (address, stride) = place(registers, memory);
                for (row, to) in tiles[number(tile)].iter_mut().enumerate() {
                    let from = std::ptr::with_exposed_provenance::<[u32; WORDS]>(address + row * stride);
                    // SAFETY: the caller of the assembly promises that the tile is readable.
                    *to = unsafe { from.read_unaligned() };
                }
            }
            ("tilestored", [memory, tile]) => {
                let (address, stride) = place(registers, memory);
                for (row, from) in tiles[number(tile)].iter().enumerate() {
                    let to = std::ptr::with_exposed_provenance_mut::<[u32; WORDS]>(address + row * stride);
                    // SAFETY: the caller of the assembly promises that the tile is writable.
                    unsafe { to.write_unaligned(*from) };
                }
            }
            ("tdpbf16ps", [sum, a, b]) => {
                let (a, b) = (tiles[number(a)], tiles[number(b)]);
                multiply(&mut tiles[number(sum)], &a, &b);
            }
            ("tilerelease", []) => return true,
            _ => panic!("the emulator knows no {line:?}"),
        }
    }
    false
}

/// `sum += a * b` over pairs of bfloat16.
fn multiply(sum: &mut [[u32; WORDS]; ROWS], a: &[[u32; WORDS]; ROWS], b: &[[u32; WORDS]; ROWS]) {
    let pair = |word: u32| [word as u16, (word >> 16) as u16].map(|half| bf16::from_bits(half).to_f32());
    for (sum, a) in sum.iter_mut().zip(a) {
        let mut sums = sum.map(f32::from_bits);
        for (&a, b) in a.iter().zip(b) {
            let [a0, a1] = pair(a);
            for (sum, &b) in sums.iter_mut().zip(b) {
                let [b0, b1] = pair(b);
                // Not `mul_add`: without the instruction that is a call of the C library.
                *sum = a1 * b1 + (a0 * b0 + *sum);
            }
        }
        *sum = sums.map(f32::to_bits);
    }
}

/// The number of `tmm0` to `tmm7`.
fn number(tile: &str) -> usize {
    let number = tile.strip_prefix("tmm").and_then(|n| n.parse().ok());
    number.filter(|n| *n < 8).unwrap_or_else(|| panic!("{tile:?} is no tile"))
}

fn parse(number: &str) -> usize {
    number.parse().unwrap_or_else(|_| panic!("{number:?} is no number"))
}

/// The register behind `{name}`.
fn register_mut<'a>(registers: &'a mut [(&str, usize)], name: &str) -> &'a mut usize {
    let name = name.trim_start_matches('{').trim_end_matches('}');
    let found = registers.iter_mut().find(|(register, _)| *register == name);
    found.map(|(_, value)| value).unwrap_or_else(|| panic!("no operand is called {name:?}"))
}

/// Address and stride of `[{base} + {stride}]` or `[{base} + {stride} + 1024]`.
fn place(registers: &mut [(&str, usize)], memory: &str) -> (usize, usize) {
    let inside = memory.strip_prefix('[').and_then(|m| m.strip_suffix(']')).expect("a place in memory");
    let parts: Vec<&str> = inside.split(" + ").collect();
    let (base, stride) = (*register_mut(registers, parts[0]), *register_mut(registers, parts[1]));
    (base + parts.get(2).map_or(0, |number| parse(number)), stride)
}
