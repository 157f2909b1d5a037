// The extension module shardsave._native: the engine's functions for Python. No other file of the core knows Python.
//
// Threads: a run releases the GIL and takes it only for its two hooks; what a hook raises ends the run and is raised.
// Ownership: the tables are copied; the caller keeps the memory at their addresses alive during the run.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>

#include "box_copy.h"
#include "crc64.h"
#include "cuda.h"
#include "engine.h"
#include "host_memory.h"
#include "ring.h"
#include "sync.h"

namespace py = pybind11;
using namespace shardsave;

namespace {

using Table = py::array_t<std::int64_t, py::array::c_style>;
using Sums = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;

// Rows that follow one another in memory, and begin `step` bytes apart in what is summed.
struct RowsInMemory {
  std::int64_t address, count, row_bytes, step;
};

template <class Row>
std::vector<Row> rows(const Table& table, const char* name) {
  constexpr auto columns = static_cast<py::ssize_t>(sizeof(Row) / sizeof(std::int64_t));
  if (table.ndim() != 2 || table.shape(1) != columns) throw py::value_error(std::string(name) + ": wrong shape");
  std::vector<Row> rows(static_cast<std::size_t>(table.shape(0)));
  if (!rows.empty()) std::memcpy(rows.data(), table.data(), rows.size() * sizeof(Row));
  return rows;
}

Access access_named(const std::string& name) {
  if (name == "buffered") return Access::buffered;
  if (name == "direct") return Access::direct;
  if (name == "auto") return Access::automatic;
  throw py::value_error("access must be 'buffered', 'direct' or 'auto'");
}

Destination destination(const py::buffer_info& info) {
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("into: the memory must be contiguous");
  return {static_cast<std::byte*>(info.ptr), static_cast<std::size_t>(info.size * info.itemsize)};
}

std::int64_t* counters(std::optional<Table>& taken, const Request& request) {
  if (!taken) return nullptr;
  if (taken->ndim() != 1 || static_cast<std::size_t>(taken->size()) != request.piece_bytes.size()) {
    throw py::value_error("taken: wrong shape");
  }
  return taken->mutable_data();
}

// The memory of a block's window, from what the caller's hook returned.
std::byte* window_memory(const py::object& window, std::int64_t length) {
  if (window.is_none()) return nullptr;
  const py::buffer_info info = py::buffer(window).request(/* writable: */ true);
  const Destination memory = destination(info);
  if (memory.bytes < static_cast<std::size_t>(length) || reinterpret_cast<std::uintptr_t>(memory.memory) % kAlignment) {
    throw py::value_error("a window is shorter than its block, or not aligned");
  }
  return memory.memory;
}

// Without `files` the blocks go `into` memory, or nowhere.
Result run_tables(bool write, const std::optional<Table>& files, const std::string& access, const Table& blocks,
                  const Table& segments, const Table& piece_bytes, bool checksum,
                  std::vector<std::pair<int, std::uint64_t>> streams, std::size_t workers, std::size_t slot_bytes,
                  std::size_t copiers, const py::object& lend, const py::object& tick,
                  const std::optional<py::buffer>& into, std::optional<Table> taken,
                  const std::vector<std::uint8_t>& windowed, const py::object& take_window,
                  const py::object& give_window) {
  Request request;
  request.write = write;
  std::optional<py::buffer_info> into_memory;  // held during the run, so that the buffer's owner keeps the memory
  if (into) into_memory = into->request(/* writable: */ true);
  if (files) request.files.assign(files->data(), files->data() + files->size());
  if (!files) request.into = into_memory ? destination(*into_memory) : Destination{};
  request.access = access_named(access);
  request.checksum = checksum;
  request.blocks = rows<Block>(blocks, "blocks");
  request.segments = rows<Segment>(segments, "segments");
  request.piece_bytes.assign(piece_bytes.data(), piece_bytes.data() + piece_bytes.size());
  request.streams = std::move(streams);
  request.workers = workers;
  request.copiers = copiers;
  request.slot_bytes = slot_bytes;
  request.taken = counters(taken, request);
  request.windowed = windowed;
  Hooks hooks;
  hooks.lend = [&lend](std::int64_t piece, std::int64_t offset, std::byte* memory, std::size_t length) {
    py::gil_scoped_acquire hold;
    lend(piece, offset, py::memoryview::from_memory(static_cast<void*>(memory), static_cast<py::ssize_t>(length)));
  };
  hooks.take_window = [&](std::size_t block) {
    py::gil_scoped_acquire hold;
    return window_memory(take_window(block), request.blocks[block].length);
  };
  hooks.give_window = [&give_window](std::size_t block) {
    py::gil_scoped_acquire hold;
    give_window(block);
  };
  hooks.tick = [&tick](std::uint64_t done) {
    py::gil_scoped_acquire hold;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    tick(done);
  };
  py::gil_scoped_release free;
  return run(request, hooks);
}

// The GIL is released while memory is mapped, pinned or freed: this may take seconds.
struct FreeWithoutGil {
  void operator()(HostMemory* memory) const {
    py::gil_scoped_release free;
    delete memory;
  }
};
using OwnedHostMemory = std::unique_ptr<HostMemory, FreeWithoutGil>;

OwnedHostMemory make_host_memory(std::size_t nbytes, int pin_for) {
  OwnedHostMemory memory;
  {
    py::gil_scoped_release free;
    // Not huge: on a virtual machine that returns free memory to its host, their first touch took five times as long.
    memory.reset(new HostMemory(nbytes, Pages::ordinary));
    if (memory->memory() != nullptr && pin_for >= 0) memory->pin(pin_for);
  }
  if (memory->memory() == nullptr) throw Fault{-1, "mmap of memory for a snapshot", ENOMEM, 0, nbytes, ""};
  return memory;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("HOST") = kHost;
  m.attr("LENT") = kLent;
  m.attr("DISCARD") = kDiscard;
  m.attr("IN_WINDOW") = kWindow;
  m.attr("STILL") = kStill;
  m.attr("SLOTS") = kSlots;
  m.attr("DEVICE_SLOTS") = kDeviceSlots;

  static py::handle fault = PyErr_NewException("shardsave._native.Fault", nullptr, nullptr);
  m.attr("Fault") = fault;
  py::register_exception_translator([](std::exception_ptr exception) {
    try {
      if (exception) std::rethrow_exception(exception);
    } catch (const Fault& f) {
      const py::tuple arguments = py::make_tuple(f.file, f.call, f.number, f.offset, f.length, f.detail);
      PyErr_SetObject(fault.ptr(), arguments.ptr());
    }
  });

  py::class_<Result>(m, "RunResult")
      .def_property_readonly("sums",
                             [](const Result& r) {
                               return py::array_t<std::uint64_t>(static_cast<py::ssize_t>(r.sums.size()),
                                                                 r.sums.data());
                             })
      .def_readonly("direct", &Result::direct)
      .def_readonly("staging_bytes", &Result::staging_bytes)
      .def_readonly("pinned", &Result::pinned)
      .def_readonly("notes", &Result::notes);

  py::class_<HostMemory, OwnedHostMemory>(m, "HostMemory", py::buffer_protocol())
      .def(py::init(&make_host_memory), py::kw_only(), py::arg("nbytes"), py::arg("pin_for"))
      .def_buffer([](const HostMemory& memory) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(memory.memory()),
                               static_cast<py::ssize_t>(memory.bytes()));
      })
      .def_property_readonly("pinned", &HostMemory::pinned)
      .def_property_readonly("refusal", &HostMemory::refusal);

  m.def("run", &run_tables, py::kw_only(), py::arg("write"), py::arg("files"), py::arg("access"), py::arg("blocks"),
        py::arg("segments"), py::arg("piece_bytes"), py::arg("checksum"), py::arg("streams"), py::arg("workers"),
        py::arg("slot_bytes"), py::arg("copiers") = 0, py::arg("lend").none(true), py::arg("tick"),
        py::arg("into") = py::none(), py::arg("taken").noconvert() = py::none(),
        py::arg("windowed") = std::vector<std::uint8_t>(), py::arg("take_window") = py::none(),
        py::arg("give_window") = py::none());
  m.def(
      "crc64",
      [](const py::buffer& data) {
        const py::buffer_info info = data.request();
        if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("the buffer must be contiguous");
        const auto length = static_cast<std::size_t>(info.size * info.itemsize);
        return crc64_finish(crc64_raw(info.ptr, length), length);
      },
      py::arg("data"), py::pos_only());
  m.def(
      "crc64_of_rows",
      [](const Table& table) {
        const std::vector<RowsInMemory> all = rows<RowsInMemory>(table, "rows");
        Sums sums(table.shape(0));
        std::uint64_t* const first = sums.mutable_data();
        py::gil_scoped_release free;
        std::transform(all.begin(), all.end(), first, [](const RowsInMemory& one) {
          return crc64_raw_of_rows(reinterpret_cast<const void*>(one.address), static_cast<std::size_t>(one.count),
                                   static_cast<std::size_t>(one.row_bytes), static_cast<std::uint64_t>(one.step));
        });
        return sums;
      },
      py::arg("rows"), py::pos_only());
  m.def(
      "crc64_shifted",
      [](const Sums& raw_sums, const Sums& nbytes) {
        if (raw_sums.ndim() != 1 || nbytes.ndim() != 1 || raw_sums.size() != nbytes.size()) {
          throw py::value_error("one length is needed for each sum");
        }
        Sums shifted(raw_sums.size());
        std::transform(raw_sums.data(), raw_sums.data() + raw_sums.size(), nbytes.data(), shifted.mutable_data(),
                       crc64_shift);
        return shifted;
      },
      py::arg("raw_sums"), py::arg("nbytes"), py::pos_only());
  m.def(
      "copy_boxes",
      [](const Table& table) {
        const std::vector<BoxCopy> copies = rows<BoxCopy>(table, "copies");
        py::gil_scoped_release free;
        copy_boxes(copies);
      },
      py::arg("copies"), py::pos_only());
  m.def("sync_files", &sync_files, py::arg("descriptors"), py::pos_only(), py::call_guard<py::gil_scoped_release>());
  m.def("crc64_implementation", &crc64_implementation);
  m.def("crc64_force_implementation", &crc64_force_implementation);
  m.def("cuda_available", &cuda_available);
  m.def("cuda_unavailable_reason", &cuda_unavailable_reason);
  m.def("release_ring", &Ring::release);
  m.def("reserve_staging", &reserve_staging, py::kw_only(), py::arg("slot_bytes"), py::arg("pin_for"),
        py::call_guard<py::gil_scoped_release>());
}
