defmodule Mix.Vllm.ArgumentsTest do
  use ExUnit.Case, async: true

  alias Mix.Vllm.Arguments

  doctest Arguments

  defp parse(argv), do: Arguments.parse!(argv, "vllm.check", ["json"])

  test "options have the names that they have in Elixir, and values of their kind" do
    argv =
      ~w(--tensor-parallel-size 2 org/m --gpu-memory-utilization=0.95 --no-enable-prefix-caching) ++
        ["--device", "2x A10G", "--quantization", "awq", "--enable-lora"]

    assert parse(argv) ==
             {"org/m",
              %{
                "tensor_parallel_size" => 2,
                "gpu_memory_utilization" => 0.95,
                "enable_prefix_caching" => false,
                "device" => "2x A10G",
                "quantization" => "awq",
                "enable_lora" => true
              }, []}
  end

  test "what is a switch leaves the next word alone" do
    assert parse(~w(--json --enforce-eager org/m)) ==
             {"org/m", %{"enforce_eager" => true}, ["json"]}

    assert {"org/m", %{"search" => true, "progress" => true}, []} =
             parse(~w(--search --progress org/m))

    assert parse(~w(org/m --enforce-eager false)) == {"org/m", %{"enforce_eager" => false}, []}
  end

  test "a revision may look like a number" do
    assert {"m", %{"revision" => "2024"}, []} = parse(~w(m --revision 2024))
  end

  test "several devices have commas between them" do
    assert {"m", %{"devices" => ["24GiB", "RTX 4090"]}, []} =
             parse(["m", "--devices", "24GiB,RTX 4090"])
  end

  test "one model is asked about, with each option once" do
    assert_raise Mix.Error, ~r/`mix vllm.check MODEL`/, fn -> parse([]) end
    assert_raise Mix.Error, ~r/"b"/, fn -> parse(~w(a b)) end

    assert_raise Mix.Error, ~r/--max-model-len once/, fn ->
      parse(~w(m --max-model-len 1 --max-model-len 2))
    end
  end
end
