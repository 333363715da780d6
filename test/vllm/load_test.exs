defmodule VLLM.LoadTest do
  # What is told of an engine that loads.
  use ExUnit.Case

  import ExUnit.CaptureIO
  import VLLM.FakeEngine

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
    log = ExUnit.CaptureLog.capture_log(fn -> start!("ready", name: Logged) end)
    assert log =~ "Logged: starting Python"
    assert log =~ "Logged: ready"
  end
end
