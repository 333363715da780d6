defmodule VLLM.LoadTest do
  # What is told of an engine that loads.
  use ExUnit.Case

  import ExUnit.{CaptureIO, CaptureLog}
  import VLLM.FakeEngine

  alias VLLM.Bridge.MessagePack

  setup do
    Application.put_env(:ex_vllm, :telemetry_listeners, test: self())
    on_exit(fn -> Application.delete_env(:ex_vllm, :telemetry_listeners) end)
  end

  test "telemetry has the start, each phase and the end of loading" do
    start!("print:Loading safetensors checkpoint shards:  50% Completed | 1/2 [x];ready",
      name: Told
    )

    # An engine of the test before may have something to tell, too.
    assert_receive {[:vllm, :load, :start], %{system_time: _}, %{engine: Told, worker: 1}}

    for phase <- [:python, :engine, :ready] do
      assert_receive {[:vllm, :load, :progress], figures, %{engine: Told, phase: ^phase}}
      assert figures.duration > 0
    end

    assert_receive {[:vllm, :load, :progress], _, %{engine: Told, phase: :weights} = weights}
    assert %{done: 1, total: 2} = weights
    assert_receive {[:vllm, :load, :stop], %{duration: _}, %{engine: Told}}
  end

  test "telemetry, the progress line and Logger have how far a download is" do
    figures = %{"bytes" => 500, "total_bytes" => 2000, "files" => 1, "total_files" => 2}
    note = [2, "load_progress", Map.put(figures, "phase", "download")]
    frame = note |> MessagePack.encode!() |> IO.iodata_to_binary() |> Base.encode16(case: :lower)

    {shown, log} =
      with_log(fn ->
        capture_io(fn -> start!("frame:#{frame};ready", progress: true, name: Fetched) end)
      end)

    words = "Fetched: downloading 0.5 of 2.0 kB (25 %), 1 of 2 files"
    assert shown =~ words
    assert log =~ words
    assert_receive {[:vllm, :load, :progress], _, %{engine: Fetched, phase: :download} = told}
    assert %{bytes: 500, total_bytes: 2000, files: 1, total_files: 2, seconds_left: nil} = told
  end

  test "the line is ended where the load fails" do
    assert capture_io(fn -> start("refuse:out_of_memory", progress: true) end) =~ ~r/engine\n\z/
  end

  test "telemetry has the error of a load that failed" do
    {:error, error} = start("refuse:out_of_memory")
    assert_receive {[:vllm, :load, :exception], %{duration: _}, %{error: ^error}}
  end

  test "a progress line is shown when asked for" do
    shown = capture_io(fn -> start!("ready", progress: true, name: Shown) end)
    assert shown =~ "Shown: starting the engine"
    assert String.ends_with?(shown, "Shown: ready\n")
  end

  test "no progress line is shown otherwise" do
    assert capture_io(fn -> start!("ready", progress: false) end) == ""
  end

  test "Logger says which phase it is in" do
    log = capture_log(fn -> start!("ready", name: Logged) end)
    assert log =~ "Logged: starting Python"
    assert log =~ "Logged: ready"
  end
end
