defmodule Mix.Tasks.Vllm.CheckTest do
  # Mix's shell is the same for all processes.
  use ExUnit.Case, async: false

  import VLLM.MixShell

  alias Mix.Tasks.Vllm.Check
  alias VLLM.Quantization.{Finding, Report}

  setup :capture_shell

  defp report(fields) do
    struct!(
      %Report{
        ok?: true,
        findings: [],
        model: "/models/m",
        architecture: "LlamaForCausalLM",
        method: "awq",
        max_model_len: 131_072,
        loaded_bytes: 5 * 1024 * 1024 * 1024,
        tensor_parallel_size: 1,
        pipeline_parallel_size: 2
      },
      fields
    )
  end

  defp finding(severity, reason, message, remedy),
    do: %Finding{
      severity: severity,
      reason: reason,
      message: message,
      remedy: remedy,
      details: %{}
    }

  test "prints what the model would be, and each finding with what to do" do
    warning = finding(:warning, :invalid_checkpoint, "A tensor is not read.", "Look at it.")
    info = finding(:info, :ok, "It reasons.", "")
    assert Check.report(report(findings: [warning, info]), []) == :ok

    assert printed() == """
           /models/m
             architecture       LlamaForCausalLM
             quantization       awq
             context            131,072 tokens
             weights            5.0 GiB at least
             pipeline parallel  2

           warning (invalid_checkpoint) A tensor is not read.
             -> Look at it.

           info (ok) It reasons.

           It can run.
           """
  end

  test "ends with status 1 where there is an error" do
    error = finding(:error, :out_of_memory, "It is too large.", "Take a smaller one.")
    refused = report(ok?: false, findings: [error], method: nil, loaded_bytes: 0)
    assert catch_exit(Check.report(refused, [])) == {:shutdown, 1}
    text = printed()
    assert text =~ "  quantization       none\n"
    refute text =~ "weights"
    assert text =~ "error (out_of_memory) It is too large.\n  -> Take a smaller one.\n"
    assert text =~ ~r/It cannot run like this\.\n\z/
  end

  test "--json prints all of it, and the status is the same" do
    assert catch_exit(Check.report(report(ok?: false), ["json"])) == {:shutdown, 1}
    text = printed()
    assert text =~ ~s("architecture": "LlamaForCausalLM")
    assert text =~ ~s("ok?": false)
    refute text =~ "It cannot run"
  end

  test "answers for a model that is not there" do
    # What can be told without vLLM takes no import of it.
    argv = ["/nowhere/at/all", "--json"]
    assert catch_exit(Check.run(argv)) == {:shutdown, 1}
    assert printed() =~ ~s("reason": "model_not_found")
  end
end
