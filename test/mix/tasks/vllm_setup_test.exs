defmodule Mix.Tasks.Vllm.SetupTest do
  # Mix's shell is the same for all processes.
  use ExUnit.Case, async: false

  import ExUnit.CaptureIO
  import VLLM.MixShell

  alias Mix.Tasks.Vllm.Setup
  alias VLLM.FakeInterpreter

  @moduletag :tmp_dir

  setup :capture_shell
  setup %{tmp_dir: tmp_dir}, do: %{venv: Path.join(tmp_dir, "venv")}

  defp run(context, fake, arguments \\ []) do
    python = FakeInterpreter.write!(context.tmp_dir, fake)
    arguments = ["--device", "cpu", "--venv", context.venv, "--python", python | arguments]
    capture_io(fn -> Setup.run(arguments) end)
  end

  test "tells the phases with the elapsed time, and where it all is", context do
    run(context, [])
    assert_received {:mix_shell, :info, [" 0:0" <> rest]}
    assert rest =~ ~r/^\d Making a virtual environment/
    done = "vLLM is installed in " <> context.venv
    run(context, [])
    assert_received {:mix_shell, :info, [^done]}
  end

  test "explains a failure with pip's last words and ends with status 1", context do
    assert catch_exit(run(context, pip: "echo ERROR: something new; exit 3")) == {:shutdown, 1}
    assert_received {:mix_shell, :error, ["pip failed." <> _]}
    assert_received {:mix_shell, :error, ["  | ERROR: something new"]}
  end

  test "takes extras by their names and by their packages' names", context do
    run(context, [], ["--with", "TorchAO,vllm-bnb-plugin", "--with", "torchao"])
    assert Map.keys(VLLM.Python.Stamp.read(context.venv).extras) == ["bitsandbytes", "torchao"]
  end

  test "refuses what it does not know" do
    assert_raise Mix.Error, ~r/`torcha`. Did you mean `torchao`\? There are: bitsandbytes/, fn ->
      Setup.run(["--with", "bitsandbytes,torcha"])
    end

    assert_raise Mix.Error, ~r/cpu or cuda/, fn -> Setup.run(["--device", "tpu"]) end
    assert_raise Mix.Error, ~r/--devise/, fn -> Setup.run(["--devise", "cpu"]) end
    assert_raise Mix.Error, ~r/"now"/, fn -> Setup.run(["now"]) end
  end
end
