defmodule Mix.Tasks.Vllm.DoctorTest do
  # Mix's shell is the same for all processes.
  use ExUnit.Case, async: false

  import ExUnit.CaptureIO
  import VLLM.MixShell

  alias Mix.Tasks.Vllm.Doctor
  alias VLLM.Error

  setup :capture_shell

  test "prints a remedy below each problem and ends with status 1" do
    error = Error.new(:python_not_found, "There is none. Run `mix vllm.setup`.")
    system = %{VLLM.Doctor.system() | executable: {:error, error}, source: {:default, "/nowhere"}}
    assert catch_exit(Doctor.report(system)) == {:shutdown, 1}
    lines = lines()
    problem = Enum.find_index(lines, &(&1 =~ ~r/problem.*Python/))
    assert Enum.at(lines, problem + 1) =~ "-> There is none. Run `mix vllm.setup`."
    assert List.last(lines) =~ "Generation cannot work here"
  end

  # vLLM is imported for it.
  @tag :slow
  @tag timeout: 180_000
  test "ends well where there is no problem" do
    handshake = fn -> {:ok, %{"protocol" => 2, "python" => "3.12.4"}} end
    assert Doctor.report(%{VLLM.Doctor.system() | handshake: handshake}) == :ok
    lines = lines()
    assert List.last(lines) == "vLLM can work here."
    # What the installed vLLM says that runs on this machine.
    line = Enum.find(lines, &(&1 =~ "Quantization"))
    assert line =~ ~r/ checkpoints: awq \(4 bits\), .*; while loading: .*fp8/
  end

  test "takes no other argument than --fix" do
    assert_raise Mix.Error, ~r/--fix/, fn -> Doctor.run(["--mend"]) end
  end

  @tag :tmp_dir
  test "--fix runs the set-up for what is missing", %{tmp_dir: tmp_dir} do
    venv = Path.join(tmp_dir, "venv")
    error = Error.new(:python_not_found, "There is none.")

    system = %{
      VLLM.Doctor.system()
      | executable: {:error, error},
        source: {:env, venv},
        device: :cpu
    }

    {:ok, opts} = VLLM.Doctor.fixes(system)
    python = VLLM.FakeInterpreter.write!(tmp_dir)
    capture_io(fn -> Mix.Tasks.Vllm.Setup.install([{:python, python} | opts]) end)
    assert Map.keys(VLLM.Python.Stamp.read(venv).extras) == VLLM.Python.extras()
    own = %{system | source: {:config, "/opt/python"}}
    assert_raise Mix.Error, ~r/of your own/, fn -> Doctor.fix(own) end
  end
end
