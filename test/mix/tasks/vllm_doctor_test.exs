defmodule Mix.Tasks.Vllm.DoctorTest do
  # Mix's shell is the same for all processes.
  use ExUnit.Case, async: false

  alias Mix.Tasks.Vllm.Doctor
  alias VLLM.Error

  setup do
    shell = Mix.shell()
    Mix.shell(Mix.Shell.Process)
    on_exit(fn -> Mix.shell(shell) end)
  end

  defp lines do
    receive do
      {:mix_shell, _, [line]} -> [line | lines()]
    after
      0 -> []
    end
  end

  test "prints a remedy below each problem and ends with status 1" do
    error = Error.new(:python_not_found, "There is none. Run `mix vllm.setup`.")
    system = %{VLLM.Doctor.system() | executable: {:error, error}, source: {:default, "/nowhere"}}
    assert catch_exit(Doctor.report(system)) == {:shutdown, 1}
    lines = lines()
    problem = Enum.find_index(lines, &(&1 =~ ~r/problem.*Python/))
    assert Enum.at(lines, problem + 1) =~ "-> There is none. Run `mix vllm.setup`."
    assert List.last(lines) =~ "Generation cannot work here"
  end

  test "ends well where there is no problem" do
    handshake = fn -> {:ok, %{"protocol" => 1, "python" => "3.12.4"}} end
    assert Doctor.report(%{VLLM.Doctor.system() | handshake: handshake}) == :ok
    assert List.last(lines()) == "vLLM can work here."
  end

  test "takes no arguments" do
    assert_raise Mix.Error, fn -> Doctor.run(["--fix"]) end
  end
end
