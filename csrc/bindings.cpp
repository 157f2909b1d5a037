// The extension module shardsave._native: the engine's functions for Python. No other file of the core knows Python.
//
// Threads: a run releases the GIL and takes it only for its two hooks; what a hook raises ends the run and is raised.
// Ownership: the tables are copied; the caller keeps the memory at their addresses alive during the run.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "crc64.h"
#include "cuda.h"
#include "engine.h"
#include "ring.h"

namespace py = pybind11;
using namespace shardsave;

namespace {

using Table = py::array_t<std::int64_t, py::array::c_style>;

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

Result run_tables(bool write, const Table& files, const std::string& access, const Table& blocks, const Table& segments,
                  const Table& piece_bytes, bool checksum, std::vector<std::pair<int, std::uint64_t>> streams,
                  std::size_t workers, std::size_t slot_bytes, const py::object& lend, const py::object& tick) {
  Request request;
  request.write = write;
  request.access = access_named(access);
  request.checksum = checksum;
  request.files.assign(files.data(), files.data() + files.size());
  request.blocks = rows<Block>(blocks, "blocks");
  request.segments = rows<Segment>(segments, "segments");
  request.piece_bytes.assign(piece_bytes.data(), piece_bytes.data() + piece_bytes.size());
  request.streams = std::move(streams);
  request.workers = workers;
  request.slot_bytes = slot_bytes;
  Hooks hooks;
  hooks.lend = [&lend](std::int64_t piece, std::int64_t offset, std::byte* memory, std::size_t length) {
    py::gil_scoped_acquire hold;
    lend(piece, offset, py::memoryview::from_memory(static_cast<void*>(memory), static_cast<py::ssize_t>(length)));
  };
  hooks.tick = [&tick](std::uint64_t done) {
    py::gil_scoped_acquire hold;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    tick(done);
  };
  py::gil_scoped_release free;
  return run(request, hooks);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("HOST") = kHost;
  m.attr("LENT") = kLent;
  m.attr("DISCARD") = kDiscard;
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

  m.def("run", &run_tables, py::kw_only(), py::arg("write"), py::arg("files"), py::arg("access"), py::arg("blocks"),
        py::arg("segments"), py::arg("piece_bytes"), py::arg("checksum"), py::arg("streams"), py::arg("workers"),
        py::arg("slot_bytes"), py::arg("lend").none(true), py::arg("tick"));
  m.def(
      "crc64",
      [](const py::buffer& data) {
        const py::buffer_info info = data.request();
        if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("the buffer must be contiguous");
        const auto length = static_cast<std::size_t>(info.size * info.itemsize);
        return crc64_finish(crc64_raw(info.ptr, length), length);
      },
      py::arg("data"), py::pos_only());
  m.def("crc64_implementation", &crc64_implementation);
  m.def("crc64_force_implementation", &crc64_force_implementation);
  m.def("cuda_available", &cuda_available);
  m.def("cuda_unavailable_reason", &cuda_unavailable_reason);
  m.def("release_ring", &Ring::release);
  m.def("reserve_staging", &reserve_staging, py::kw_only(), py::arg("slot_bytes"), py::arg("pin_for"),
        py::call_guard<py::gil_scoped_release>());
}
